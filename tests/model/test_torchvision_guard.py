"""The package imports beside a torchvision that does not fit torch, and says so without one."""

import subprocess
import sys

import torch

from model._torchvision import plain_nms
from tests.conftest import REPO

BROKEN = """
import torch
real = torch.ops.load_library
def refuse(path):
    if "torchvision" in str(path):
        raise OSError("undefined symbol")
    return real(path)
torch.ops.load_library = refuse
try:
    import torchvision
except RuntimeError as error:
    assert "torchvision::nms" in str(error), error
else:
    raise SystemExit("torchvision was expected to be broken here")
import sys
for name in [n for n in sys.modules if n.startswith("torchvision")]:
    del sys.modules[name]
import model.sam, model.lisat, model.lora, torchvision, peft
boxes = torch.tensor([[0., 0, 10, 10], [1, 1, 10, 10], [20, 20, 30, 30]])
kept = torchvision.ops.nms(boxes, torch.tensor([.5, .9, .1]), 0.5)
assert kept.tolist() == [1, 2], kept
print("fine")
"""

NONE = """
import sys
sys.modules["torchvision"] = None
from model._torchvision import ensure_torchvision
assert not ensure_torchvision()
import model.clip, model.llava, model.losses
print("fine")
"""


def run(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPO, check=False)
    assert done.returncode == 0 and "fine" in done.stdout, done.stderr


def test_imports_beside_a_torchvision_that_does_not_fit() -> None:
    run(BROKEN)


def test_parts_import_without_torchvision() -> None:
    run(NONE)


def test_plain_nms_equals_the_compiled_one() -> None:
    from torchvision.ops import nms

    torch.manual_seed(0)
    corner = torch.rand(50, 2) * 40
    boxes, scores = torch.cat((corner, corner + 5 + torch.rand(50, 2) * 20), dim=1), torch.rand(50)
    for threshold in (0.1, 0.5, 0.9):
        assert torch.equal(plain_nms(boxes, scores, threshold), nms(boxes, scores, threshold))
    assert plain_nms(boxes[:0], scores[:0], 0.5).shape == (0,)
