"""What workers send: small tensors as their bytes, large ones as memory that is shared."""

import torch
from torch import Tensor

from datamodules.outcomes import result
from datamodules.stream.workers import SMALL, reading


def made(rows: int) -> dict[str, Tensor]:
    whole = torch.arange(2 * rows).reshape(rows, 2)
    return {"column": whole[:, 1], "mask": whole[:, 0] % 3 == 0, "none": whole[:0], "gain": whole / 3}


def test_workers_send_tensors_as_they_are() -> None:
    rows = [3, SMALL // 8 + 1]
    answers = [result(answer) for answer in reading(made, rows, 2, persistent=False)]
    for count, sent in zip(rows, answers, strict=True):
        expected = made(count)
        assert sent.keys() == expected.keys()
        for name, tensor in sent.items():
            torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)
            assert tensor.dtype == expected[name].dtype
            tensor.zero_()  # may be written to
    small, large = answers
    assert large["column"].is_shared()
    assert not any(tensor.is_shared() for tensor in small.values())
