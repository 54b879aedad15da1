"""The doctor's negative controls of the lesson `when`."""

from control import Control, replaced

OFTEN = dict(lesson="when", val_check_interval=2, patience=1000)
DRAWS = OFTEN | dict(shared_generator=True)
STOPS = OFTEN | dict(lr=0.3, patience=1, max_epochs=4)
MORE = "More epochs or batches"

WHEN: dict[str, Control] = {
    "patience counted in epochs": replaced(
        "plain", "steps", MORE, "                if not once_an_epoch:\n",
        "                if step % len(train_loader) == 0:\n", **STOPS),
    "min_epochs met before its last epoch is over": replaced(
        "plain", "steps", MORE, "callbacks.stopped and epoch >= args.min_epochs",
        "callbacks.stopped and epoch + 1 >= args.min_epochs", **STOPS | dict(min_epochs=2)),
    "min_epochs forgotten": replaced(
        "lightning", "steps", MORE, "        min_epochs=args.min_epochs,\n", "",
        **STOPS | dict(min_epochs=2)),
    "one step more than max_steps": replaced(
        "plain", "steps", MORE, "if step == max_steps or (callbacks.stopped and epoch >= ",
        "if step > max_steps or (callbacks.stopped and epoch >= ", **OFTEN | dict(max_steps=19)),
    "the validation draws on one side": Control(
        "lightning", "random", "Random numbers", settings=OFTEN, own=dict(shared_generator=True)),
    "one side validates more often": Control(
        "plain", "random", "Random numbers", settings=DRAWS, own=dict(val_check_interval=3)),
    "a sanity check that draws": Control(
        "plain", "random", "Random numbers",
        (("    with torch.random.fork_rng():\n", "    if True:\n"),), settings=DRAWS),
    "train mode only at the start of an epoch": Control(
        "plain", "mode", "model.train() is missing",
        (("            net.train()\n", ""),
         ("    for epoch in range(args.max_epochs):\n        if not",
          "    for epoch in range(args.max_epochs):\n        net.train()\n        if not")),
        settings=OFTEN),
    "batches to overfit that are shuffled": replaced(
        "plain", "batch", "Other samples", "        train_loader = unshuffled(",
        "        unshuffled(", **OFTEN | dict(overfit_batches=4)),
    "fast_dev_run left in": Control(
        "lightning", "steps", MORE, settings=OFTEN, own=dict(fast_dev_run=3)),
}  # fmt: skip
