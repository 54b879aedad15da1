"""The doctor's negative controls of the lesson `fabric`: a loop by hand, and one on Fabric."""

from control import Control, replaced

ONE = dict(lesson="fabric", devices=1)
FOUR = ONE | dict(accumulate_grad_batches=4, gradient_clip_val=0.3)
CLIP = "clip_grad_norm_(net.parameters(), args.gradient_clip_val)\n"

FABRIC: dict[str, Control] = {
    "set_epoch forgotten, which Fabric calls": replaced(
        "plain", "batch", "set_epoch is missing in",
        "        train_loader.sampler.set_epoch(epoch)\n", "", **ONE),
    "a look at Fabric's loader": replaced(
        "lightning", "batch", "Shuffled with another seed",
        "    #: One seed for all", "    next(iter(train_loader))\n    #: One seed for all", **ONE),
    "Fabric's loss not divided": replaced(
        "lightning", "loss", "The loss is divided by",
        "fabric.backward(loss / group)", "fabric.backward(loss)", **ONE),
    "clipped to another norm": replaced(
        "plain", "clipping", "The gradients' norm is clipped", CLIP,
        CLIP.replace("args.gradient_clip_val", "0.1"), **FOUR),
    "Fabric does not clip": replaced(
        "lightning", "clipping", "The gradients' norm is clipped",
        "            if clip:\n", "            if False:\n", **FOUR),
    "gradients of the group before": replaced(
        "lightning", "clipping", "Left-over gradients",
        "            optimizer.zero_grad()\n", "", **ONE | dict(gradient_clip_val=0.0)),
    "the last group without a step": replaced(
        "plain", "steps", "The rest of an epoch's batches",
        "% group == 0 or batch == len(train_loader)", "% group == 0", **FOUR),
    "dropout that goes on from the network's seed": replaced(
        "lightning", "random", "Random numbers",
        "    #: As the Trainer does with several processes: dropout begins from the seed.\n"
        "    fabric.seed_everything(args.seed, verbose=False)\n", "", **ONE),
    # Fabric hands the network inputs in half precision, where autocast alone leaves them.
    "Fabric in half precision": Control(
        "lightning", "batch", "Another type of number", settings=ONE,
        own=dict(precision="bf16-mixed")),
    "another momentum for Fabric": replaced(
        "lightning", "update", "Another setting of the optimizer: momentum",
        "args.lr, args.momentum)", "args.lr, 0.8)", **ONE),
}  # fmt: skip
