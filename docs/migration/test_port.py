"""The proof that the port trains as the loop does: `python -m pytest test_port.py`."""

import lightning as L
import loop
import port
import torch
from samebits import Trace, assert_parity, callback


def test_port_trains_as_the_loop(tmp_path):
    data = loop.make_texts(1000, seed=0)

    torch.manual_seed(0)
    net = loop.TextNet()
    with Trace(net, path=tmp_path / "loop.trace"):
        loop.train(net, *data)

    torch.manual_seed(0)
    net = loop.TextNet()
    port.train(net, *data, callbacks=[callback(L.Callback, tmp_path / "port.trace")])

    assert_parity(tmp_path / "loop.trace", tmp_path / "port.trace")
