"""The doctor's negative controls of the lesson `gan`: two networks, two optimizers."""

from control import Control, replaced

GAN = dict(lesson="gan", batch_size=16, max_epochs=2, warmup_steps=5)
TWO = GAN | dict(accumulate_grad_batches=2)
FIRST = "torch.optim.Adam(gan.discriminator.parameters(), lr, betas)"

GANS: dict[str, Control] = {
    "gan: no set_epoch": replaced(
        "plain", "batch", "set_epoch is missing in",
        "        train_loader.sampler.set_epoch(epoch)\n", "", **GAN),
    "gan: another rate for the discriminator": Control(
        "plain", "update", "Another learning rate", settings=GAN,
        own=dict(discriminator_lr=1e-3)),
    "gan: the generator's rate does not decay": replaced(
        "plain", "update", "A schedule on one side only", "        decay.step()\n", "", **GAN),
    "gan: the warm-up before the step": Control(
        "plain", "update", "The schedule moves before", (
            ("            if due:\n                warm_up.step()\n", ""),
            ("                    optimizer.step()\n",
             "                    if optimizer is first:\n"
             "                        warm_up.step()\n"
             "                    optimizer.step()\n")),
        settings=GAN),
    "gan: other labels for what is made": replaced(
        "plain", "loss", "Another loss", "torch.zeros_like(fake)", "torch.full_like(fake, 0.1)",
        **GAN),
    "gan: the loss not divided": replaced(
        "plain", "loss", "The loss is divided by", "(loss / group).backward()",
        "loss.backward()", **TWO),
    "gan: the discriminator is not clipped": replaced(
        "plain", "clipping", "The gradients' norm is clipped", "if args.gradient_clip_val:",
        "if args.gradient_clip_val and optimizer is second:", **GAN | dict(gradient_clip_val=0.1)),
    "gan: gradients left over": replaced(
        "lightning", "clipping", "Left-over gradients",
        "                    optimizer.zero_grad()\n", "", **GAN | dict(gradient_clip_val=0.0)),
    "gan: no train() after the evaluation": replaced(
        "plain", "mode", "model.train() is missing", "        gan.train()\n", "", **GAN),
    "gan: other betas": replaced(
        "plain", "update", "Another setting of the optimizer: betas", FIRST,
        FIRST.replace("betas", "(0.9, 0.999)"), **GAN),
}  # fmt: skip
