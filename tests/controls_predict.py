"""The doctor's negative controls of the lesson `predict`: it trains before it predicts."""

from control import Control, replaced

ONE = dict(lesson="predict", devices=1, max_epochs=2)
SGD = "torch.optim.SGD(net.parameters(), args.lr, args.momentum)"
NET = "    model = DistributedDataParallel(net)\n"

PREDICT: dict[str, Control] = {
    "predict: no set_epoch": replaced(
        "plain", "batch", "set_epoch is missing in",
        "        train_loader.sampler.set_epoch(epoch)\n", "", **ONE),
    "predict: another seed for the network": replaced(
        "plain", "start", "Another seed", "    seed_everything(args.seed)\n    net",
        "    seed_everything(args.seed + 1)\n    net", **ONE),
    "predict: dropout from the network's seed": replaced(
        "plain", "random", "Random numbers", "    seed_everything(args.seed)\n    for",
        "    for", **ONE),
    "predict: another learning rate": replaced(
        "plain", "update", "Another learning rate", SGD, SGD.replace("args.lr", "2 * args.lr"),
        **ONE),
    "predict: weight decay on one side": replaced(
        "plain", "update", "Another weight decay", SGD, SGD.replace(
            "momentum)", "momentum, weight_decay=1e-4)"), **ONE),
    "predict: Nesterov's momentum": replaced(
        "plain", "update", "Another setting of the optimizer: nesterov", SGD, SGD.replace(
            "momentum)", "momentum, nesterov=True)"), **ONE),
    "predict: a layer frozen": replaced(
        "plain", "gradient", "Frozen or detached", NET,
        "    net.backbone[0].requires_grad_(False)\n" + NET, **ONE),
    "predict: another batch size": Control(
        "plain", "batch", "Another batch size", settings=ONE, own=dict(batch_size=12)),
    "predict: one epoch more": Control(
        "lightning", "steps", "More epochs or batches", settings=ONE, own=dict(max_epochs=3)),
}  # fmt: skip
