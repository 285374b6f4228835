"""Values go back to where their tokens came from, whatever the model does with their order."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_generic_attn import GenericAttention, UnsupportedAttentionError
from zoo import encoder, laws, oracles
from zoo.encoder import BATCH, TOKENS, WIDTH, Block

TARGET = 1
ORDER = [3, 0, 5, 1, 4, 2]


def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


class Moving(nn.Module):
    """Embeds, moves its tokens about, attends, and reads one row or the mean of all."""

    def __init__(self, move: Callable[[Tensor], Tensor], read: int | str) -> None:
        super().__init__()
        self.move, self.read = move, read
        self.embed = nn.Embedding(20, WIDTH)
        self.position = nn.Parameter(torch.zeros(1, TOKENS, WIDTH))
        self.prompt = nn.Parameter(torch.zeros(1, 2, WIDTH))
        self.blocks = nn.ModuleList(Block(fused) for _ in range(2))
        self.head = nn.Linear(WIDTH, 4)
        oracles.randomise(self.double().eval())

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.move(self.embed(input_ids) + self.position)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(dim=1) if self.read == "mean" else x[:, self.read])

    def row(self, input_ids: Tensor) -> Tensor:
        """The explained row over the tokens in the order in which attention sees them."""
        with oracles.exposed_fused_attention() as kept:
            maps = oracles.maps_from(lambda: self(input_ids), kept, TARGET)
        tokens = maps[0].shape[-1]
        rows = list(range(tokens)) if self.read == "mean" else [self.read % tokens]
        return oracles.read_row(oracles.propagate(maps), rows)


def gathered(x: Tensor) -> Tensor:
    index = torch.tensor(ORDER).expand(len(x), -1)
    return torch.gather(x, 1, index[..., None].expand(-1, -1, x.shape[-1]))


# name -> (what is done to [B, N, D], where each token of the input is found afterwards)
MOVES: dict[str, tuple[Callable[[Tensor], Tensor], list[int | None]]] = {
    "flip": (lambda x: x.flip(1), [5, 4, 3, 2, 1, 0]),
    "roll": (lambda x: x.roll(2, dims=1), [2, 3, 4, 5, 0, 1]),
    "index": (lambda x: x[:, ORDER], [ORDER.index(i) for i in range(TOKENS)]),
    "index_select": (
        lambda x: x.index_select(1, torch.tensor(ORDER)),
        [ORDER.index(i) for i in range(TOKENS)],
    ),
    "gather": (gathered, [ORDER.index(i) for i in range(TOKENS)]),
    "cat of slices": (lambda x: torch.cat([x[:, 4:], x[:, :4]], dim=1), [2, 3, 4, 5, 0, 1]),
    "split and cat": (lambda x: torch.cat(x.split(3, dim=1)[::-1], 1), [3, 4, 5, 0, 1, 2]),
    "stack of unbound": (lambda x: torch.stack(x.unbind(1)[::-1], 1), [5, 4, 3, 2, 1, 0]),
    "tokens first and back": (lambda x: x.mT.permute(2, 0, 1).permute(1, 0, 2), [0, 1, 2, 3, 4, 5]),
    "laid out as a grid": (
        lambda x: x.view(len(x), 2, 3, -1).transpose(1, 2).reshape(len(x), TOKENS, -1),
        [0, 2, 4, 1, 3, 5],
    ),
    "channels first and back": (lambda x: x.mT.flatten(2).permute(0, 2, 1), [0, 1, 2, 3, 4, 5]),
    "the first dropped": (lambda x: x[:, 1:], [None, 0, 1, 2, 3, 4]),
    "every second": (lambda x: x[:, ::2], [0, None, 1, None, 2, None]),
}  # fmt: skip


@pytest.mark.parametrize("read", [1, "mean"])
@pytest.mark.parametrize("name", MOVES)
def test_values_follow_their_tokens(name: str, read: int | str) -> None:
    move, places = MOVES[name]
    model = Moving(move, read)
    row = model.row(encoder.ids())
    columns = [row[:, place] if place is not None else row[:, 0] * 0 for place in places]
    expected = torch.stack(columns, dim=1)
    laws.assert_same(GenericAttention(model).attribute(encoder.ids(), TARGET), expected)


@pytest.mark.parametrize("where", [0, 3, TOKENS])
@pytest.mark.parametrize("read", [0, "mean"])
def test_prompts_among_the_tokens_belong_to_their_stream(where: int, read: int | str) -> None:
    model = Moving(lambda x: x, read)

    def with_prompt(x: Tensor) -> Tensor:
        prompt = model.prompt.expand(len(x), -1, -1)
        return torch.cat([x[:, :where], prompt, x[:, where:]], dim=1)

    model.move = with_prompt
    row = model.row(encoder.ids())
    expected = torch.cat([row[:, :where], row[:, where + 2 :]], dim=1)
    method = GenericAttention(model)
    laws.assert_same(method.attribute(encoder.ids(), TARGET), expected)
    relevance = method.relevance(encoder.ids(), TARGET)
    assert list(relevance.streams) == ["input_ids"]
    assert relevance.streams["input_ids"].tokens == TOKENS + 2
    assert relevance.matrix("prompt", "input_ids").shape[1] == 2


def test_tokens_that_are_chosen_by_their_content() -> None:
    """Pruning: each example goes on with its class token and its own three greatest tokens."""

    class Pruning(Moving):
        def kept(self, x: Tensor) -> Tensor:
            greatest = x.norm(dim=-1)[:, 1:].topk(3, dim=1).indices + 1
            return F.pad(greatest, (1, 0))

        def forward(self, input_ids: Tensor) -> Tensor:
            x = self.blocks[0](self.embed(input_ids) + self.position)
            index = self.kept(x)[..., None].expand(-1, -1, x.shape[-1])
            return self.head(self.blocks[1](torch.gather(x, 1, index))[:, 0])

    model = Pruning(lambda x: x, 0)
    with oracles.exposed_fused_attention() as kept:
        first, second = oracles.maps_from(lambda: model(encoder.ids()), kept, TARGET)
    places = model.kept(model.blocks[0](model.embed(encoder.ids()) + model.position))
    assert places[0].tolist() != places[1].tolist()
    dense = torch.zeros_like(first)
    for example, place in enumerate(places):
        dense[example][place[:, None], place] = second[example]
    expected = oracles.read_row(oracles.propagate([first, dense]), 0)
    laws.assert_same(GenericAttention(model).attribute(encoder.ids(), TARGET), expected)


def test_registers_that_come_and_go() -> None:
    """Parameters join the stream for the second of three blocks."""

    class Passing(Moving):
        def forward(self, input_ids: Tensor) -> Tensor:
            x = self.blocks[0](self.embed(input_ids) + self.position)
            x = torch.cat([x, self.prompt.expand(len(x), -1, -1)], dim=1)
            x = self.blocks[1](x)[:, :TOKENS]
            return self.head(self.blocks[0](x)[:, 0])

    model = Passing(lambda x: x, 0)
    with oracles.exposed_fused_attention() as kept:
        maps = oracles.maps_from(lambda: model(encoder.ids()), kept, TARGET)
    maps = [F.pad(one, (0, TOKENS + 2 - one.shape[1]) * 2) for one in maps]
    expected = oracles.read_row(oracles.propagate(maps), 0)[:, :TOKENS]
    laws.assert_same(GenericAttention(model).attribute(encoder.ids(), TARGET), expected)


@pytest.mark.parametrize("read", [1, 3, "mean"])
def test_padding_that_stays_among_the_tokens_is_refused(read: int | str) -> None:
    """Zeros that attend and are attended hand relevance on, but are tokens of nothing."""
    model = Moving(lambda x: F.pad(x, (0, 0, 2, 1)), read)
    with pytest.raises(ValueError, match="padding"):
        GenericAttention(model).attribute(encoder.ids(), TARGET)


def test_copies_of_a_token_are_refused() -> None:
    """One origin in two places: neither place alone has its value."""
    model = Moving(lambda x: torch.cat([x, x[:, 2:3]], dim=1), "mean")
    with pytest.raises(UnsupportedAttentionError, match=r"blocks\.0.*several places"):
        GenericAttention(model).attribute(encoder.ids(), TARGET)


def test_inputs_that_are_summed_share_their_tokens_value() -> None:
    model = Moving(lambda x: x, 0)
    kinds = nn.Embedding(2, WIDTH).double()

    def forward(input_ids: Tensor, token_type_ids: Tensor, offsets: Tensor) -> Tensor:
        x = model.embed(input_ids) + kinds(token_type_ids) + offsets + model.position
        for block in model.blocks:
            x = block(x)
        return model.head(x[:, 0])

    types = encoder.ids() % 2
    offsets = torch.randn(BATCH, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0)).double()
    with oracles.exposed_fused_attention() as kept:
        maps = oracles.maps_from(lambda: forward(encoder.ids(), types, offsets), kept, TARGET)
    expected = oracles.read_row(oracles.propagate(maps), 0)
    words, kinds_, places = GenericAttention(forward).attribute(
        (encoder.ids(), types, offsets), TARGET
    )
    laws.assert_same(words, expected)
    laws.assert_same(kinds_, expected)
    laws.assert_same(places, expected[..., None].expand_as(offsets))


@pytest.mark.parametrize("read", [1, "mean"])
def test_queries_of_every_second_token(read: int | str) -> None:
    """Only some tokens ask and go on, without a residual (LeViT): the others were seen as keys."""

    class Thinning(Moving):
        def forward(self, input_ids: Tensor) -> Tensor:
            first, second = self.blocks
            x = first(self.embed(input_ids) + self.position)
            state = first.norm(x)
            q, k, v = (
                projection(part).unflatten(-1, (encoder.HEADS, -1)).transpose(1, 2)
                for projection, part in zip(
                    (first.attention.query, first.attention.key, first.attention.value),
                    (state[:, ::2], state, state),
                    strict=True,
                )
            )
            x = second(fused(q, k, v).transpose(1, 2).flatten(2))
            return self.head(x.mean(dim=1) if read == "mean" else x[:, read])

    model = Thinning(lambda x: x, read)
    with oracles.exposed_fused_attention() as kept:
        whole, thin, last = oracles.maps_from(lambda: model(encoder.ids()), kept, TARGET)
    identity = torch.eye(TOKENS, dtype=torch.float64)
    left = torch.arange(0, TOKENS, 2)
    relevance = identity[left] + thin @ (identity + whole)
    change = relevance + last @ relevance - identity[left]
    expected = change.mean(dim=1) if read == "mean" else change[:, read]
    if read != "mean":
        expected[:, left[read]] = 0
    laws.assert_same(GenericAttention(model).attribute(encoder.ids(), TARGET), expected)


# --- pictures ---------------------------------------------------------------------------------

PATCH, GRID = 4, (2, 3)


def by_convolution(stem: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: stem.convolution(x).flatten(2).mT


def by_two_convolutions(stem: nn.Module) -> Callable[[Tensor], Tensor]:
    """A shortcut beside the main branch, as in the residual stem of a hybrid."""
    return lambda x: (stem.convolution(x) + stem.second(x)).flatten(2).mT


def by_reshape(stem: nn.Module) -> Callable[[Tensor], Tensor]:
    def patches(x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        x = x.view(batch, channels, height // PATCH, PATCH, width // PATCH, PATCH)
        return stem.linear(x.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, PATCH * PATCH * channels))

    return patches


def by_tensor_unfold(stem: nn.Module) -> Callable[[Tensor], Tensor]:
    def patches(x: Tensor) -> Tensor:
        x = x.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH)
        return stem.linear(x.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2))

    return patches


def by_functional_unfold(stem: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: stem.linear(F.unfold(x, PATCH, stride=PATCH).mT)


def column_by_column(stem: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: stem.convolution(x).transpose(2, 3).flatten(2).mT


def in_two_steps(stem: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: stem.deep(x).flatten(2).mT


STEMS = {
    "convolution": (by_convolution, True),
    "convolution and shortcut": (by_two_convolutions, True),
    "column by column": (column_by_column, True),
    "two strided convolutions": (in_two_steps, True),
    "reshape and linear": (by_reshape, False),
    "Tensor.unfold": (by_tensor_unfold, False),
    "F.unfold": (by_functional_unfold, False),
}


class Pictured(nn.Module):
    def __init__(self, patches: Callable[[nn.Module], Callable[[Tensor], Tensor]]) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.second = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.deep = nn.Sequential(nn.Conv2d(3, 5, 2, 2), nn.ReLU(), nn.Conv2d(5, WIDTH, 2, 2))
        self.linear = nn.Linear(PATCH * PATCH * 3, WIDTH)
        self.patches = patches(self)
        self.cls = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.blocks = nn.ModuleList(Block(fused) for _ in range(2))
        self.head = nn.Linear(WIDTH, 4)
        oracles.randomise(self.double().eval())

    def forward(self, pixels: Tensor) -> Tensor:
        x = torch.cat([self.cls.expand(len(pixels), -1, -1), self.patches(pixels)], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.head(x[:, 0])


@pytest.mark.parametrize("name", STEMS)
def test_patches_of_a_picture(name: str) -> None:
    patches, convolution = STEMS[name]
    model = Pictured(patches)
    pixels = torch.randn(2, 3, GRID[0] * PATCH, GRID[1] * PATCH, dtype=torch.float64)
    with oracles.exposed_fused_attention() as kept:
        maps = oracles.maps_from(lambda: model(pixels), kept, TARGET)
    row = oracles.read_row(oracles.propagate(maps), 0)[:, 1:]
    expected = row.reshape(2, *GRID)
    if name == "column by column":
        expected = row.reshape(2, GRID[1], GRID[0]).mT
    method = GenericAttention(model, interpolation="nearest")
    try:
        heatmap = method.attribute(pixels, TARGET)
    except ValueError:
        assert not convolution, "a convolution tells where its patches lie"
        # No geometry is told from these; the values of the tokens are still there.
        laws.assert_same(method.attribute(pixels, TARGET, return_input_shape=False), row)
        return
    cells = expected.repeat_interleave(PATCH, 1).repeat_interleave(PATCH, 2)
    laws.assert_same(heatmap, cells[:, None].expand(-1, 3, -1, -1))
    laws.assert_same(method.attribute(pixels, TARGET, return_input_shape=False), expected)


@pytest.mark.parametrize("windows", [2, 3])
def test_windows_of_one_grid(windows: int) -> None:
    """SAM's windowed attention, where 3 does not divide 4 and the edge is padded."""
    timm = pytest.importorskip("timm", reason="SAM's encoder is timm's")
    model = timm.create_model(
        "samvit_base_patch16_224", img_size=64, embed_dim=16, depth=3, num_heads=2,
        window_size=windows, global_attn_indexes=(1,), num_classes=5,
    )  # fmt: skip
    oracles.randomise(model.eval().double())
    pixels = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    drops = [module for name, module in model.named_modules() if name.endswith("attn_drop")]
    with oracles.exposed_outputs(drops) as kept:
        output = model(pixels)[0, TARGET]
        gradients = torch.autograd.grad(output, kept)
    across = -(-4 // windows)
    maps = []
    for attention, gradient in zip(kept, gradients, strict=True):
        product = (attention.detach() * gradient).clamp(min=0)
        if product.shape[-1] == 16:
            maps.append(product.reshape(1, 2, 16, 16).mean(1))
            continue
        product = product.reshape(across, across, 2, windows**2, windows**2).mean(2)
        dense = torch.zeros(1, 16, 16, dtype=torch.float64)
        for index in torch.cartesian_prod(*[torch.arange(n) for n in product.shape]).tolist():
            top, left, query, key = index[0] * windows, index[1] * windows, *index[2:]
            rows = top + query // windows, top + key // windows
            columns = left + query % windows, left + key % windows
            if max(*rows, *columns) < 4:
                places = rows[0] * 4 + columns[0], rows[1] * 4 + columns[1]
                dense[0, places[0], places[1]] += product[tuple(index)]
        maps.append(dense)
    expected = oracles.read_row(oracles.propagate(maps), range(16)).reshape(1, 4, 4)
    actual = GenericAttention(model).attribute(pixels, TARGET, return_input_shape=False)
    laws.assert_same(actual, expected)


@pytest.mark.parametrize("heads_axis", [True, False], ids=["five axes", "folded into the batch"])
def test_rows_then_columns_of_one_grid(heads_axis: bool) -> None:
    """Divided (axial) attention: within each row of the grid, then within each column."""
    height, width = GRID

    class Axial(Pictured):
        def forward(self, pixels: Tensor) -> Tensor:
            x = self.patches(pixels).unflatten(1, GRID)
            for block, transposed in zip(self.blocks, (False, True), strict=True):
                state = x.transpose(1, 2) if transposed else x
                state = block.norm(state)
                shape = state.shape
                if not heads_axis:
                    state = state.flatten(0, 1)
                q, k, v = (
                    projection(state).unflatten(-1, (encoder.HEADS, -1)).transpose(-3, -2)
                    for projection in (
                        block.attention.query,
                        block.attention.key,
                        block.attention.value,
                    )
                )
                output = fused(q, k, v).transpose(-3, -2).flatten(-2).reshape(shape)
                output = block.attention.out(output)
                x = x + (output.transpose(1, 2) if transposed else output)
            return self.head(x.mean(dim=(1, 2)))

    model = Axial(by_convolution)
    pixels = torch.randn(2, 3, height * PATCH, width * PATCH, dtype=torch.float64)
    with oracles.exposed_fused_attention() as kept:
        gradients = torch.autograd.grad(model(pixels)[:, TARGET].sum(), kept)
    maps = []
    for attention, gradient, along in zip(kept, gradients, (width, height), strict=True):
        product = (attention.detach() * gradient).clamp(min=0)
        product = product.reshape(2, -1, encoder.HEADS, along, along).mean(2)
        dense = torch.zeros(2, *GRID, *GRID, dtype=torch.float64)
        for line in range(product.shape[1]):
            if along == width:
                dense[:, line, :, line, :] = product[:, line]
            else:
                dense[:, :, line, :, line] = product[:, line]
        maps.append(dense.flatten(3).flatten(1, 2))
    expected = oracles.read_row(oracles.propagate(maps), range(height * width)).reshape(2, *GRID)
    actual = GenericAttention(model).attribute(pixels, TARGET, return_input_shape=False)
    laws.assert_same(actual, expected)
