"""Float32Callback on TRL's path for quantised bases, which is taken when the model says that it is quantised."""

import pytest
import torch
from peft import get_peft_model

from eigenpeft.trainers.float32_callback import Float32Callback
from tests.trl.conftest import CONFIGS, make_trainer, tiny_base

pytestmark = pytest.mark.filterwarnings("default")


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize(("callbacks", "expected"), [([], torch.bfloat16), ([Float32Callback()], torch.float32)])
def test_coefficients_stay_float32_with_the_callback_and_not_without(kind, callbacks, expected, make_config, tmp_path):
    base = tiny_base(dtype=torch.bfloat16)
    model = get_peft_model(base, make_config(kind))
    base.is_loaded_in_8bit = True  # all that TRL looks at; the weights stay bfloat16
    trainer = make_trainer("sft", tmp_path, model=model, callbacks=callbacks)
    assert {value.dtype for value in model.parameters() if value.requires_grad} == {expected}
    base.is_loaded_in_8bit = False
    assert trainer.optimizer is None, "the optimizer must be made after the cast"
