"""Attacks with the signatures of torchattacks 3.5.1: a script changes its import and nothing else.

    from atlas_kernels.compat import torchattacks

    attack = torchattacks.PGD(model, eps=8 / 255, alpha=2 / 255, steps=10)
    adv_images = attack(images, labels)

Starts and random targets are drawn as torchattacks draws them, from torch's global generators: with the same seed both
give the same adversaries, to rounding, and the same random numbers afterwards. Names, defaults, the order of arguments,
the modes of ``set_mode_*`` and ``set_model_training_mode``, ``save`` and ``load`` are its own. What is overridden works
as there: ``forward``, ``get_logits``, ``get_target_label``, ``normalize`` and the others; settings may change between
calls. torchattacks' wrappers (MultiAttack, LGV) take these attacks, and MultiAttack here takes torchattacks'.

What differs, on purpose:

- The model is left as it was found: each module's own mode (a frozen BatchNorm stays frozen), running statistics,
  gradients. Its ``train()`` and ``eval()`` are not called, only the flags of its modules change. What it draws itself,
  dropout's masks say, are other numbers, and none from the global state; what an overridden ``get_logits`` draws is as
  there.
- After random or least likely targets, which are chosen in eval mode, and after each attack of a MultiAttack, the mode
  that is set holds again; torchattacks calls ``model.train()`` there, which un-freezes BatchNorm and dropout.
- It works under ``no_grad`` and ``inference_mode``, for labels of any integer type, and for a model that is moved
  after the attack was made (``set_device`` fixes the device).
- eps and alpha may be tensors of one value per sample, [B] or [B, 1, 1, 1], in every attack.
- Refused, with a reason: images outside [0, 1] or with NaN, also after ``set_normalization_used`` is undone (but for
  rounding), labels that are no classes, eps of 1 or more in l_inf, radii per channel, models that are no modules.
- An image with a NaN among its logits counts as wrong, and its class as -1; torchattacks takes NaN for the largest.
- A gradient that is NaN moves nothing, and MI-FGSM takes a gradient of zero as zero. Where float32 rounds the gradient
  of a nearly certain prediction to zero in torchattacks, it keeps its sign here.
- 16-bit images are computed with in float32 and rounded once a step.
- ``save`` writes its file once, at the end.
"""

from .._missing import refuse
from . import attack as attack
from . import attacks as attacks
from . import wrappers as wrappers
from .attack import Attack as Attack
from .attacks.ffgsm import FFGSM
from .attacks.fgsm import FGSM
from .attacks.mifgsm import MIFGSM
from .attacks.pgd import PGD
from .attacks.pgdl2 import PGDL2
from .attacks.tpgd import TPGD
from .wrappers.multiattack import MultiAttack

__version__ = "3.5.1"  # of torchattacks, whose interface this is
__all__ = ["FFGSM", "FGSM", "MIFGSM", "PGD", "PGDL2", "TPGD", "MultiAttack"]
__wrapper__ = ["MultiAttack"]

_ELSEWHERE = """
    APGD APGDT AutoAttack BIM CW DIFGSM DeepFool EADEN EADL1 EOTPGD FAB GN JSMA Jitter LGV NIFGSM OnePixel PGDRS
    PGDRSL2 PIFGSM PIFGSMPP Pixle RFGSM SINIFGSM SPSA SparseFool Square TIFGSM UPGD VANILA VMIFGSM VNIFGSM
"""
__getattr__ = refuse(
    __name__,
    __all__,
    _ELSEWHERE.split(),
    "Import it from torchattacks: its attacks run beside these, also in one MultiAttack.",
)
