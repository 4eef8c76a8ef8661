"""Prefix reuse gives the bits of the whole network, on chains and on networks that are none."""

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from analysis.replay import Replay, find_cuts
from analysis.sweeps.entry_points import entered, execution, input_of

ROOM = 1 << 30


def small(name: str, **options: object) -> nn.Module:
    """A timm model with random weights that differ from one another."""
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=5, **options).eval()


def images(count: int, size: int = 32) -> Tensor:
    """Random images."""
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(count))


MODELS = {
    "resnet": lambda: small("resnet10t"),
    "vit": lambda: small("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=3),
    "swin": lambda: small("swin_tiny_patch4_window7_224", img_size=32, embed_dim=24, depths=(1, 2), num_heads=(2, 4),
                          window_size=4),
    "mobilenet": lambda: small("mobilenetv3_small_050"),
    "convnext": lambda: small("convnext_atto", depths=(1, 2, 1, 1)),
    "densenet": lambda: small("densenet121", block_config=(2, 2)),
}  # fmt: skip
BLOCKS = {
    "resnet": {"layer2.0", "layer4.0", "fc"},
    "vit": {"blocks.0", "blocks.1", "blocks.2", "head"},
    "swin": {"layers.0.blocks.0", "layers.1.blocks.0", "layers.1.blocks.1", "head"},
    "mobilenet": {"blocks.1.0", "blocks.2.1", "classifier"},
    "convnext": {"stages.1.blocks.1", "stages.3.blocks.0"},
    "densenet": {"features.denseblock1", "features.denseblock2", "classifier"},
}


@pytest.mark.parametrize("name", MODELS)
def test_stages_and_blocks_are_found(name):
    """Every block of a chain is a cut, in order of execution, and the model is left as it was."""
    model = MODELS[name]()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    cuts = find_cuts(model, images(2))
    assert {cut.module for cut in cuts} >= BLOCKS[name]
    assert [cut.entry for cut in cuts] == sorted(cut.entry for cut in cuts)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any("forward" in vars(module) or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("name", MODELS)
def test_every_changed_layer_gives_the_bits_of_the_whole_network(name):
    """Each layer's weight changed in turn, in network order: the same logits as without reuse, on unequal batches."""
    model = MODELS[name]()
    batches = [images(3), images(2), images(3) + 1]
    replay = Replay(model, batches, find_cuts(model, images(2)), cache_bytes=ROOM)
    run = execution(model, batches[0])
    layers = [n for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear)) and n in run.entry]
    entered_at = set()
    for layer in sorted(layers, key=run.entry.__getitem__):
        replay.move_to(layer)
        entered_at.add(replay.cut.module if replay.cut else None)
        weight = model.get_submodule(layer).weight
        original = weight.detach().clone()
        with torch.no_grad():
            weight.mul_(1.1)
            whole = [model(batch) for batch in batches]
            assert all(torch.equal(replay(batch), logits) for batch, logits in zip(batches, whole, strict=True)), layer
            weight.copy_(original)
    assert len(entered_at) > 3
    assert not replay.refused


INNER = {
    "resnet": ("layer2.0.conv2", "layer2.0", ()),
    "vit": ("blocks.1.mlp", "blocks.1", ("blocks.1.drop_path1",)),
    "swin": ("layers.1.blocks.1.mlp.fc2", "layers.1.blocks.1", ("layers.1.blocks.1.drop_path1",)),
}


@pytest.mark.parametrize("name", INNER)
def test_residual_blocks_are_entered_in_the_middle(name):
    """The block's input is given back for the shortcut, and the first branch's output for the second residual sum."""
    module, base, kept = INNER[name]
    cut = next(cut for cut in find_cuts(MODELS[name](), images(2)) if cut.module == module)
    assert (cut.base, cut.kept) == (base, kept)


class Branches(nn.Module):
    """A chain of a linear and three blocks of two layers, with shortcuts of every `kind`."""

    class Block(nn.Module):
        """Two layers and shortcuts."""

        def __init__(self, kind: str) -> None:
            super().__init__()
            self.kind, self.norm1, self.norm2, self.act = kind, nn.LayerNorm(8), nn.LayerNorm(8), nn.ReLU(inplace=True)
            self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)
            self.seen = torch.zeros(())

        def forward(self, x: Tensor) -> Tensor:
            """(batch, 8) in, (batch, 8) out."""
            y = self.one(self.norm1(x))
            if self.kind == "overwritten":
                return x + self.two(self.act(y)) + y
            if self.kind == "called twice":
                return x + self.two(self.one(y)) + y
            if self.kind == "remembered":
                self.seen = y.mean(dim=1, keepdim=True)
                return x + self.two(self.norm2(y)) + self.seen
            middle = 0.5 * x + y if self.kind == "scaled" else x + y
            out = middle + self.two(self.norm2(middle))
            return out + x * middle if self.kind == "third use" else out

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.stem = nn.Linear(8, 8)
        self.blocks = nn.Sequential(*(self.Block(kind) for _ in range(3)))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 8) in, (batch, 8) out."""
        return self.blocks(self.stem(x))


@pytest.mark.parametrize(
    ("kind", "found"),
    [
        ("plain", True),
        ("scaled", True),
        ("third use", True),
        ("remembered", True),
        ("overwritten", False),
        ("called twice", False),
    ],
)
def test_a_block_is_entered_in_the_middle_only_with_the_same_bits(kind, found):
    """Sums, scales and further uses are computed again from what is held; what a skipped layer wrote over is not."""
    torch.manual_seed(0)
    model, batches = Branches(kind).eval(), [torch.randn(4, 8), torch.randn(3, 8), torch.randn(4, 8)]
    cuts = find_cuts(model, batches[0][:1])
    assert ("blocks.1.two" in {cut.module for cut in cuts}) == found
    replay = Replay(model, batches, cuts, cache_bytes=ROOM)
    for block in range(3):
        for layer in ("one", "two"):
            replay.move_to(f"blocks.{block}.{layer}")
            weight = model.blocks[block].get_submodule(layer).weight
            with torch.no_grad():
                original = weight.clone()
                weight.mul_(1.1)
                whole = [model(batch) for batch in batches]
                assert all(torch.equal(replay(batch), logits) for batch, logits in zip(batches, whole, strict=True))
                weight.copy_(original)
    assert not replay.refused


def test_an_inner_cut_is_taken_only_where_all_batches_have_room():
    """What an inner cut needs besides must not push a batch out of the cache: the whole block is taken then."""
    model, batches = MODELS["vit"](), [images(2), images(3)]
    cuts = find_cuts(model, images(1))
    tokens = 5 * 17 * 192 * 4
    for room, module in ((3, "blocks.1.mlp"), (2, "blocks.1.attn.proj"), (1, "blocks.1"), (0.5, "blocks.1")):
        replay = Replay(model, batches, cuts, cache_bytes=int(room * tokens))
        replay.move_to("blocks.1.mlp.fc1")
        assert replay.cut is not None
        assert replay.cut.module == module


def test_a_state_that_reaches_past_a_cut_is_seen_on_a_single_batch():
    """What a module remembers of the batch is that of another run as soon as the module is not run."""
    torch.manual_seed(0)
    model, batch = Odd("kept").eval(), torch.randn(4, 8)
    replay = Replay(model, [batch], find_cuts(model, batch), cache_bytes=ROOM)
    replay.move_to("block")
    assert replay.cut is None
    assert replay.refused == ["block"]


@pytest.mark.parametrize("name", ["resnet", "vit", "swin"])
def test_cuts_cost_a_few_passes(name):
    """Finding them: 20 passes of one image at most. Trying them and going through all layers: 2.2 passes over all."""
    model, batches = MODELS[name](), [images(8) + shift for shift in range(4)]

    def flops(call):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            result = call()
        return counter.get_total_flops(), result

    one, _ = flops(lambda: model(images(1)))
    finding, cuts = flops(lambda: find_cuts(model, images(1)))
    assert finding < 20 * one
    replay = Replay(model, batches, cuts, cache_bytes=ROOM)
    moving, _ = flops(lambda: [replay.move_to(cut.module) for cut in cuts])
    assert moving < 2.2 * 32 * one


class Skips(nn.Module):
    """Not a chain: the first layer's output is used again at the end; the second layer is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third, self.last = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 8) in, (batch, 8) out."""
        a = self.first(x)
        b = self.second(self.second(a).relu())
        return self.last(self.third(b) + a.tanh())


def test_what_is_no_chain_is_entered_only_where_one_tensor_decides():
    """A tensor that jumps over a module forbids entering there; after the jump it is allowed again."""
    torch.manual_seed(0)
    model = Skips()
    assert [cut.module for cut in find_cuts(model, torch.randn(4, 8))] == ["last"]


class InPlaceBlocks(nn.Module):
    """Blocks that change their input in place, as a ResNet's ReLU may."""

    class Block(nn.Module):
        """One layer over an input that it overwrites."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            """(batch, 8) in, (batch, 8) out."""
            return x.relu_() + self.layer(x)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(8, 8)
        self.blocks = nn.Sequential(*(self.Block() for _ in range(3)))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 8) in, (batch, 8) out."""
        return self.blocks(self.stem(x))


def test_blocks_that_overwrite_their_input_run_again_and_again():
    """The kept tensor is copied for each run where the network writes into it."""
    torch.manual_seed(0)
    model, batches = InPlaceBlocks(), [torch.randn(4, 8), torch.randn(3, 8)]
    with torch.no_grad():
        expected = [model(batch) for batch in batches]
    replay = Replay(model, batches, find_cuts(model, torch.randn(2, 8)), cache_bytes=ROOM)
    for block in ("blocks.0.layer", "blocks.1.layer", "blocks.2.layer"):
        replay.move_to(block)
        assert replay.cut is not None
        assert replay.cut.module == block.removesuffix(".layer")
        for _ in range(3):
            with torch.no_grad():
                assert all(torch.equal(replay(batch), e) for batch, e in zip(batches, expected, strict=True))


@settings(deadline=None, max_examples=25)
@given(st.data())
def test_any_order_of_layers_and_any_room(data):
    """Going back and forth, with room for all, some or none of the batches, changes no bit."""
    model = MODELS["vit"]()
    batches = [images(2), images(3), images(1)]
    room = data.draw(st.sampled_from([0, 2 * 17 * 192 * 4, 5 * 17 * 192 * 4, ROOM]))
    replay = Replay(model, batches, find_cuts(model, images(1)), cache_bytes=room)
    with torch.no_grad():
        expected = [model(batch) for batch in batches]
        layers = st.sampled_from([n for n, m in model.named_modules() if isinstance(m, nn.Linear)])
        for layer in data.draw(st.lists(layers, min_size=1, max_size=4)):
            replay.move_to(layer)
            assert all(torch.equal(replay(batch), e) for batch, e in zip(batches, expected, strict=True))


def test_work_is_saved():
    """Behind the cut every module runs, before it none."""
    model, batch = MODELS["vit"](), images(2)
    replay = Replay(model, [batch], find_cuts(model, batch), cache_bytes=ROOM)
    replay.move_to("blocks.2.mlp.fc1")
    ran: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda *_, name=name: ran.append(name))
    with torch.no_grad():
        replay(batch)
    assert ran == ["blocks.2.mlp.fc1", "blocks.2.mlp.fc2", "head"]


def test_placeholders_show_a_dependence_that_was_overlooked():
    """Entering where another tensor is needed too gives NaN, never a plausible number."""
    torch.manual_seed(0)
    model, x = Skips(), torch.randn(4, 8)
    run = execution(model, x)
    cuts = find_cuts(model, x)
    wrong = type(cuts[0])(module="third", entry=run.entry["third"], skipped=("first",), filled=False)
    with torch.no_grad(), entered(model, wrong, run, input_of(model, "third", x)):
        assert model(x).isnan().all()


class Note:
    """An object that a tensor can hide in."""

    def __init__(self, x: Tensor) -> None:
        self.x = x


class Odd(nn.Module):
    """A first layer whose result reaches the last one past the block, in a way that NaN does not show."""

    class First(nn.Linear):
        """A linear that also returns, or keeps, something else made of its output."""

        def __init__(self, way: str) -> None:
            super().__init__(8, 8)
            self.way, self.kept = way, torch.zeros(())

        def forward(self, x: Tensor) -> tuple[Tensor, object]:
            """(batch, 8) in; a tensor of that shape and an extra out."""
            y = super().forward(x)
            self.kept = y.mean().detach()
            extra = {"kept": None, "object": Note(y.mean()), "float": float(y.mean()),
                     "integer": y.argmax(dim=1)}[self.way]  # fmt: skip
            return y, extra

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.first = way, self.First(way)
        self.block, self.last = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 8) in, (batch, 8) out."""
        y, extra = self.first(x)
        y = self.block(y)
        more = {"kept": lambda: self.first.kept, "object": lambda: extra.x, "float": lambda: extra,
                "integer": lambda: extra[:, None].float()}[self.way]()  # fmt: skip
        return self.last(y + more)


@pytest.mark.parametrize("way", ["kept", "object", "float", "integer"])
def test_what_reaches_past_a_cut_unseen_by_nan_is_refused(way):
    """State, objects, numbers and integers: the bits are those of full passes on every batch."""
    torch.manual_seed(0)
    model, batches = Odd(way).eval(), [torch.randn(4, 8) * factor for factor in (1, 3, 5)]
    replay = Replay(model, batches, find_cuts(model, batches[0]), cache_bytes=ROOM)
    for module in ("block", "last"):
        replay.move_to(module)
        with torch.no_grad():
            original = model.last.weight.clone()
            model.last.weight.mul_(1.1)
            for batch in batches:
                expected = model(batch)
                model(batches[0])
                assert torch.equal(replay(batch), expected), module
            model.last.weight.copy_(original)


def test_a_forward_of_the_user_s_own_is_put_back():
    """A forward that was put on a module object stands there again afterwards."""
    model, batch = MODELS["vit"](), images(2)
    model.blocks[0].forward = lambda x, **_: x + 1
    with torch.no_grad():
        before = model(batch)
        replay = Replay(model, [batch], find_cuts(model, batch), cache_bytes=ROOM)
        replay.move_to("blocks.2.mlp.fc1")
        replay(batch)
        assert torch.equal(model(batch), before)
    assert "forward" in vars(model.blocks[0])


def test_an_error_leaves_the_model_whole():
    """A forward pass that fails while it is entered midway leaves no placeholder and no hook."""
    model, batch = MODELS["resnet"](), images(2)
    cut = next(cut for cut in find_cuts(model, batch) if cut.module == "layer2.0")
    with pytest.raises(RuntimeError), entered(model, cut, execution(model, batch), torch.randn(2, 7, 3, 3)):
        model(batch)
    assert not any("forward" in vars(module) or module._forward_pre_hooks for module in model.modules())
