"""Vision transformers of timm: every family's calls, values, batch and geometry."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

timm = pytest.importorskip("timm", reason="the families of timm need timm")

from captum_generic_attn import GenericAttention  # noqa: E402
from zoo import laws, oracles  # noqa: E402

TARGETS = (3, 1)


@dataclass(frozen=True)
class Family:
    """One timm architecture, made small, and what its explanation must look like."""

    name: str
    grid: tuple[int, int] = (4, 6)
    patch: int = 16
    prefix: int = 1
    pooled: str = "token"  # what the head reads: "token", "tokens" (all of the prefix), "avg"
    modules: tuple[str, ...] = ("blocks.0.attn", "blocks.1.attn")
    groups: tuple[int, ...] = (1, 1)  # how many calls in a row read the same state
    options: dict[str, Any] = field(default_factory=dict)
    first_centre: float | None = None  # the pixel that the first token is centred on

    @property
    def centre(self) -> float:
        return (self.patch - 1) / 2 if self.first_centre is None else self.first_centre

    @property
    def size(self) -> tuple[int, int]:
        return self.grid[0] * self.patch, self.grid[1] * self.patch

    def build(self, fused: bool) -> nn.Module:
        small = dict(embed_dim=24, num_heads=3, depth=2, num_classes=5)
        model = timm.create_model(self.name, **(small | self.options), img_size=self.size)
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = fused
        return oracles.randomise(model.eval().double())

    @property
    def tokens(self) -> int:
        return self.prefix + self.grid[0] * self.grid[1]

    @property
    def explained(self) -> list[int]:
        if self.pooled == "token":
            return [0]
        if self.pooled == "tokens":
            return list(range(self.prefix))
        return list(range(self.prefix, self.tokens))


TALKING = ("blocks.0.attn", "blocks.1.attn", "blocks_token_only.0.attn", "blocks_token_only.1.attn")
PARALLEL = tuple(f"blocks.{i}.attns.{j}.attn" for i in range(2) for j in range(2))
FAMILIES = (
    Family("vit_tiny_patch16_224"),
    Family("vit_small_patch32_224", grid=(2, 3), patch=32),
    Family("vit_base_patch16_xp_224", modules=("blocks.0", "blocks.1")),
    Family("deit_tiny_distilled_patch16_224", prefix=2, pooled="tokens"),
    Family("deit3_small_patch16_224"),
    Family("vit_small_patch14_dinov2", patch=14),
    Family("vit_small_patch14_reg4_dinov2", patch=14, prefix=5),
    Family("vit_wee_patch16_reg1_gap_256", pooled="avg"),
    Family("vit_little_patch16_reg4_gap_256", prefix=4, pooled="avg"),
    Family("vit_relpos_small_patch16_224", prefix=0, pooled="avg"),
    Family("vit_srelpos_small_patch16_224", prefix=0, pooled="avg"),
    Family("vit_small_patch16_rope_224"),
    Family("vit_small_patch16_rope_mixed_224"),
    Family("vit_base_patch16_rope_reg1_gap_256", pooled="avg"),
    Family("vit_small_patch16_dinov3", prefix=5, pooled="avg"),
    Family("eva02_tiny_patch14_224", patch=14, pooled="avg"),
    Family("beit_base_patch16_224", pooled="avg"),
    Family("beitv2_base_patch16_224", pooled="avg"),
    Family("vit_base_patch16_siglip_gap_224", prefix=0, pooled="avg"),
    Family("aimv2_large_patch14_224", patch=14, prefix=0, pooled="avg"),
    Family("flexivit_small"),
    Family("test_vit", modules=tuple(f"blocks.{i}.attn" for i in range(6)), groups=(1,) * 6,
           options=dict(embed_dim=32, num_heads=2, depth=6)),
    # 7 × 7 by 2, pool 3 × 3 by 2, both padded for "same" size: 2i + 1, then 4i + 3; 8 × 8 by 8.
    Family("vit_tiny_r_s16_p8_224", grid=(2, 3), patch=32, first_centre=17),
    pytest.param(
        # Four stages on: 4i + 3, then 2i + 1 in each of three strided 3 × 3 convolutions.
        Family("vit_base_r26_s32_224", grid=(2, 3), patch=32, first_centre=31),
        marks=[pytest.mark.slow, pytest.mark.ci_sample],
    ),
    Family("vit_small_patch16_18x2_224", modules=PARALLEL, groups=(2, 2)),
    # Gated positional attention over square grids; the class token joins after the first block.
    Family("convit_tiny", grid=(4, 4), options=dict(embed_dim=8, local_up_to_layer=1)),
    Family("cait_xxs24_224", modules=TALKING, groups=(1, 1, 1, 1)),
)  # fmt: skip


def explained_by_oracle(family: Family, model: nn.Module, picture: Tensor, fused: bool) -> Tensor:
    """The heat map over the grid, from probabilities that the model itself exposes."""
    if fused:
        exposure = oracles.exposed_fused_attention()
    else:
        drops = [module for name, module in model.named_modules() if name.endswith("attn_drop")]
        exposure = oracles.exposed_outputs(drops)
    with exposure as probabilities:
        maps = oracles.maps_from(lambda: model(picture), probabilities, TARGETS)
    # A class token that joins later stands in front of the patches.
    maps = [F.pad(one, (1, 0, 1, 0)) if one.shape[-1] < family.tokens else one for one in maps]
    grouped, start = [], 0
    for count in family.groups:
        grouped.append(maps[start : start + count])
        start += count
    assert start == len(maps)
    relevance = oracles.propagate(grouped, family.tokens)
    values = oracles.read_row(relevance, family.explained)[:, family.prefix :]
    return values.reshape(-1, *family.grid)


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.name)
def family(request: pytest.FixtureRequest) -> Family:
    return request.param


@pytest.fixture(scope="module")
def models(family: Family) -> dict[bool, nn.Module]:
    return {fused: family.build(fused) for fused in (True, False)}


@pytest.fixture(scope="module")
def picture(family: Family) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 3, *family.size, generator=generator, dtype=torch.float64)


@pytest.fixture(scope="module")
def expected(family: Family, models: dict[bool, nn.Module], picture: Tensor) -> Tensor:
    # The eager modules' own probabilities; talking heads have no other form.
    return explained_by_oracle(family, models[False], picture, fused=False)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "eager"])
def test_explanation_equals_the_exposed_probabilities(family, models, picture, expected, fused):
    method = GenericAttention(models[fused])
    heatmap = method.attribute(picture, torch.tensor(TARGETS), return_input_shape=False)
    laws.assert_same(heatmap, expected)


def test_two_ways_to_expose_probabilities_agree(family, models, picture, expected):
    if family.name in {"cait_xxs24_224", "convit_tiny"}:
        pytest.skip("talking heads and gates change probabilities, which no fused call can do")
    laws.assert_same(explained_by_oracle(family, models[True], picture, fused=True), expected)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "eager"])
def test_calls_rows_and_output(family, models, picture, fused):
    model = models[fused]
    seen, relevance = laws.output_under_capture(
        model, lambda: GenericAttention(model).relevance(picture, torch.tensor(TARGETS))
    )
    with torch.no_grad():
        laws.assert_same(seen, model(picture), 1e-12)
    assert laws.used_modules(relevance) == list(family.modules)
    used = [call for call in relevance.calls if call.used]
    assert {(call.query_stream, call.key_stream) for call in used} == {("x", "x")}
    assert {call.heads for call in used} == {2 if family.name == "test_vit" else 3}
    assert [call.index for call in relevance.calls] == list(range(len(relevance.calls)))
    assert relevance.streams["x"].tokens == family.tokens
    weights = torch.zeros(2, family.tokens, dtype=torch.float64)
    weights[:, family.explained] = 1 / len(family.explained)
    torch.testing.assert_close(relevance.rows["x"].double(), weights, rtol=0, atol=1e-7)


def test_batch_is_its_examples(models, picture):
    laws.assert_batch_is_its_examples(GenericAttention(models[True]), picture, TARGETS)


def nearest_token(family: Family, count: int) -> tuple[list[int], list[int]]:
    """The pixels along an axis that have one nearest token, and that token's place."""
    centres = [family.centre + family.patch * j for j in range(count)]
    pixels, places = [], []
    for pixel in range(count * family.patch):
        distances = [abs(pixel - centre) for centre in centres]
        if distances.count(min(distances)) == 1:
            pixels.append(pixel)
            places.append(distances.index(min(distances)))
    return pixels, places


def test_each_pixel_takes_the_value_of_its_own_token(family, models, picture, expected):
    """A hybrid's cells are centred on what its tokens see, which its paddings shift."""
    method = GenericAttention(models[True], interpolation="nearest")
    heatmap = method.attribute(picture, torch.tensor(TARGETS))
    assert torch.equal(heatmap, heatmap[:, :1].expand(-1, 3, -1, -1))
    (rows, row_places), (columns, column_places) = (
        nearest_token(family, count) for count in family.grid
    )
    if family.first_centre is None:
        assert [len(rows), len(columns)] == list(family.size)
    actual = heatmap[:, 0, rows][:, :, columns]
    laws.assert_same(actual, expected[:, row_places][:, :, column_places])


def test_tokens_lie_in_the_picture_row_by_row(family, models, picture):
    def stem(leaf: Tensor) -> Tensor:
        tokens = models[True].patch_embed(leaf)
        return tokens.flatten(1, -2) if tokens.ndim == 4 else tokens

    laws.assert_grid_order(stem, picture[:1], family.grid)
