"""Example inputs from a transformers model's own main input and config."""

import pytest
import torch
from torch import nn

from oftfx import CaptureError
from oftfx.inputs import example_inputs


class Config:
    is_encoder_decoder = False

    def __init__(self, **fields):
        self.__dict__.update(fields)


class Model(nn.Module):
    """Quacks like a transformers model."""

    def __init__(self, main: str, config: Config, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.main_input_name = main
        self.config = config
        self.fc = nn.Linear(2, 2, dtype=dtype)

    def forward(self, input_ids=None, pixel_values=None, decoder_input_ids=None, use_cache=None):
        raise AssertionError("example inputs are made without running the model")


def test_tokens():
    given = example_inputs(Model("input_ids", Config()))
    assert set(given) == {"input_ids", "use_cache"}
    assert given["input_ids"].dtype == torch.long
    assert given["input_ids"].dim() == 2
    assert given["use_cache"] is False


def test_everything_is_on_meta():
    for main in ("input_ids", "pixel_values", "input_features", "input_values"):
        given = example_inputs(Model(main, Config(is_encoder_decoder=True)))
        tensors = [value for value in given.values() if isinstance(value, torch.Tensor)]
        assert tensors
        assert all(tensor.device.type == "meta" for tensor in tensors)


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (Config(image_size=32, num_channels=1), (1, 1, 32, 32)),
        (Config(image_size=(24, 40)), (1, 3, 24, 40)),
        (Config(vision_config=Config(image_size=16, num_channels=4)), (1, 4, 16, 16)),
        (Config(), (1, 3, 224, 224)),
    ],
)
def test_pixels_have_the_configs_shape_and_the_models_dtype(config, shape):
    given = example_inputs(Model("pixel_values", config, torch.bfloat16))
    assert given["pixel_values"].shape == shape
    assert given["pixel_values"].dtype == torch.bfloat16


def test_speech_features_fill_the_encoders_positions():
    """Whisper halves the frames and refuses any other number of them."""
    config = Config(num_mel_bins=8, max_source_positions=16)
    assert example_inputs(Model("input_features", config))["input_features"].shape == (1, 8, 32)


def test_a_decoder_gets_its_own_tokens():
    given = example_inputs(Model("input_ids", Config(is_encoder_decoder=True)))
    assert given["decoder_input_ids"].shape == given["input_ids"].shape


def test_a_forward_without_a_cache_is_not_given_one():
    class Encoder(Model):
        def forward(self, input_ids):
            raise AssertionError

    assert set(example_inputs(Encoder("input_ids", Config()))) == {"input_ids"}


def test_no_transformers_model_asks_for_example_inputs():
    with pytest.raises(CaptureError, match=r"Linear is no transformers model.*example_inputs"):
        example_inputs(nn.Linear(2, 2))


def test_an_unknown_main_input_is_named():
    with pytest.raises(CaptureError, match=r"'point_cloud'.*example_inputs=\{'point_cloud'"):
        example_inputs(Model("point_cloud", Config()))
