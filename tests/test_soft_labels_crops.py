"""Crops of an image: cut out as Pillow does by hand, drawn as a function of their seeds."""

import numpy as np
import pytest
import torch
from PIL import Image

from analysis.inputs.crops import cut, draw_crop, fingerprint
from analysis.inputs.listing import InputConfig, list_images
from quant.soft_label_format import Crop

CONFIG = InputConfig(input_size=(3, 24, 16), mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
PIXELS = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
KIND = {"scale": (0.08, 0.936), "ratio": (0.75, 4 / 3), "flip": 0.5}


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(("name", "filter"), [("bicubic", Image.Resampling.BICUBIC),
                                              ("bilinear", Image.Resampling.BILINEAR)])  # fmt: skip
def test_a_view_is_pillows_crop_resized_mirrored_and_normalised(flip, name, filter):
    """To the bit; box and size in the order that is easily mistaken."""
    config = InputConfig(input_size=CONFIG.input_size, mean=CONFIG.mean, std=CONFIG.std, interpolation=name)
    view = cut(Image.fromarray(PIXELS), Crop(top=3, left=7, height=30, width=20, flip=flip), config)
    by_hand = Image.fromarray(PIXELS).crop((7, 3, 27, 33)).resize((16, 24), filter)
    values = torch.from_numpy(np.array(by_hand)).permute(2, 0, 1).float() / 255
    mean, std = torch.tensor(CONFIG.mean).view(3, 1, 1), torch.tensor(CONFIG.std).view(3, 1, 1)
    expected = (values - mean) / std
    assert torch.equal(view, expected.flip(2) if flip else expected)


def test_the_whole_image_at_its_size_is_that_of_evaluation(tmp_path):
    """The same arithmetic from pixels to numbers: what differs in training is the view alone."""
    (tmp_path / "a").mkdir()
    Image.fromarray(PIXELS[:24, :16]).save(tmp_path / "a" / "0.png")
    listing = list_images(f"folder:{tmp_path}", "train", None, None, CONFIG, class_order=None, by_name=False)
    image = listing.read(0)
    assert torch.equal(cut(image, Crop(0, 0, 24, 16, False), CONFIG), listing.transform(image))


def test_a_crop_is_a_function_of_its_seeds():
    """The same again after other draws, which it does not disturb; others for other seeds, images or numbers."""
    image = Image.fromarray(PIXELS)
    first = draw_crop(image, 3, 1, 4, **KIND)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert draw_crop(image, 3, 1, 4, **KIND) == first
    assert torch.equal(torch.get_rng_state(), state)
    others = {draw_crop(image, *seeds, **KIND)[:4] for seeds in ((4, 1, 4), (3, 2, 4), (3, 1, 5), (1, 3, 4))}
    assert len(others) == 4
    assert first[:4] not in others


def test_other_pixels_have_another_fingerprint():
    """One pixel by one, the same bytes in another shape, grey or colour; the same image again has the same."""
    image = Image.fromarray(PIXELS)
    changed = PIXELS.copy()
    changed[39, 49, 2] ^= 1
    others = [Image.fromarray(changed), Image.fromarray(PIXELS.reshape(50, 40, 3)), image.convert("L")]
    x = torch.from_numpy(PIXELS).float().permute(2, 0, 1)
    found = [fingerprint(image), *map(fingerprint, others), fingerprint(x), fingerprint(x.reshape(3, 50, 40))]
    assert len(set(found)) == len(found)
    assert fingerprint(Image.fromarray(PIXELS)) == found[0]
    assert fingerprint(x.contiguous()) == fingerprint(x)
    assert all(0 <= value < 2**32 for value in found)
