"""The doctor's negative controls of the lesson `tokens`: a GPT on a stream of dicts."""

from control import Control, replaced

GPT = dict(lesson="tokens", batch_size=8, max_epochs=2, warmup_steps=3, sample_length=2)
LOSS = 'loss = summed_loss(net, batch) * batch["share"] * group'
STEP = "            optimizer.step()\n"

TOKENS: dict[str, Control] = {
    "tokens: the same pass each time": replaced(
        "plain", "batch", "Samples of another shape",
        "        train_loader.dataset.set_epoch(epoch)\n", "", **GPT),
    "tokens: a mean of means": replaced(
        "plain", "loss", "A mean over another count", LOSS,
        'loss = summed_loss(net, batch) / (batch["target"] >= 0).sum()', **GPT),
    "tokens: padding counts": replaced(
        "plain", "loss", "Other weights of samples, tokens", 'targets = batch["target"].flatten()',
        'targets = batch["target"].flatten().clamp(min=0)', **GPT),
    "tokens: the last window makes no step": replaced(
        "plain", "steps", "The rest of an epoch's batches", "if number % group and not last:",
        "if number % group:", **GPT | dict(accumulate_grad_batches=4)),
    "tokens: decay for biases and norms, too": replaced(
        "plain", "update", "Another weight decay", '"weight_decay": 0.0}', '"weight_decay": 0.1}',
        **GPT),
    "tokens: a schedule that knows no end": replaced(
        "lightning", "update", "Another schedule", "steps = self.args.max_epochs * self.batches",
        "steps = self.trainer.estimated_stepping_batches", **GPT),
    "tokens: the schedule by epoch": replaced(
        "lightning", "update", "The schedule moves by step", '"interval": "step"',
        '"interval": "epoch"', **GPT),
    "tokens: gradients left over": replaced(
        "plain", "clipping", "Left-over gradients", "            optimizer.zero_grad()\n", "",
        **GPT | dict(gradient_clip_val=0.0)),
    "tokens: another norm": replaced(
        "plain", "clipping", "The gradients' norm is clipped",
        "clip_grad_norm_(parameters, args.gradient_clip_val)", "clip_grad_norm_(parameters, 0.1)",
        **GPT),
    "tokens: other betas": replaced(
        "plain", "update", "Another setting of the optimizer: betas", "(0.9, 0.95)",
        "(0.9, 0.999)", **GPT),
    "tokens: no train() after the evaluation": replaced(
        "plain", "mode", "model.train() is missing", "        net.train()\n", "", **GPT),
}  # fmt: skip
