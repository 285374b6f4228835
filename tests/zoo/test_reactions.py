"""Trained transformers of chemical reactions: rxnfp's classifier and rxnmapper's shared layer.

Both packages bring their weights; neither is a dependency, and neither is imported here: only
their files are read.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from captum_generic_attn import GenericAttention
from zoo import laws, oracles

transformers = pytest.importorskip("transformers", reason="the reaction models need transformers")
pytestmark = [pytest.mark.slow]

# Textbook reactions, one or two of each kind, written down for this test.
REACTIONS = (
    "CCO.[Fe].[Cl-].[NH4+].Cc1ccc([N+](=O)[O-])cc1>>Cc1ccc(N)cc1",
    "O=C(O)c1ccccc1.NCc1ccccc1.CCN=C=NCCCN(C)C.CN(C)C=O>>O=C(NCc1ccccc1)c1ccccc1",
    "Brc1ccc(C(C)=O)cc1.OB(O)c1ccccc1.O=C([O-])[O-].[Na+].[Na+]>>CC(=O)c1ccc(-c2ccccc2)cc1",
    "CC(C)(C)OC(=O)N1CCN(c2ccccc2)CC1.O=C(O)C(F)(F)F.ClCCl>>c1ccc(N2CCNCC2)cc1",
    "COC(=O)c1ccc(Br)cc1.[Na+].[OH-].CO>>O=C(O)c1ccc(Br)cc1",
    "O=Cc1ccccc1.C1COCCN1.[BH3-]C#N.[Na+].CO>>c1ccc(CN2CCOCC2)cc1",
    "Oc1ccc(C=O)cc1.BrCc1ccccc1.O=C([O-])[O-].[K+].[K+]>>O=Cc1ccc(OCc2ccccc2)cc1",
    "O=[N+]([O-])c1ccc(F)cc1.C1CCNCC1.CS(C)=O>>O=[N+]([O-])c1ccc(N2CCCCC2)cc1",
    "Cc1ccc(S(=O)(=O)Cl)cc1.Nc1ccccc1.c1ccncc1>>Cc1ccc(S(=O)(=O)Nc2ccccc2)cc1",
    "O=C(O)c1ccc(Cl)cc1.CO.O=S(=O)(O)O>>COC(=O)c1ccc(Cl)cc1",
    "Cc1ccc(C#N)cc1.O=C1CCC(=O)N1Br.ClC(Cl)(Cl)Cl>>N#Cc1ccc(CBr)cc1",
    "OCc1ccc(Br)cc1.O=[Mn]=O.ClCCl>>O=Cc1ccc(Br)cc1",
    "CC(=O)c1ccc(Cl)cc1.[BH4-].[Na+].CO>>CC(O)c1ccc(Cl)cc1",
    "CC(C)(C)OC(=O)OC(=O)OC(C)(C)C.NCCc1ccccc1.ClCCl>>CC(C)(C)OC(=O)NCCc1ccccc1",
    "C#CC(C)(C)O.Ic1ccccc1.CCNCC>>CC(C)(O)C#Cc1ccccc1",
    "OCc1ccncc1.O=S(Cl)Cl.ClCCl>>ClCc1ccncc1",
)
TOKEN = re.compile(
    r"\[[^\]]+]|Br|Cl|[BCNOSPFIbcnosp]|>>|%[0-9]{2}|[0-9]|[().=#\-+\\/:~@?*$]",
)


def files_of(package: str, folder: str) -> Path:
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        pytest.skip(f"{package} is not installed")
    return Path(found.submodule_search_locations[0]) / "models" / "transformers" / folder


def weights(folder: Path) -> dict[str, Tensor]:
    return torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True)


class Vocabulary:
    def __init__(self, folder: Path) -> None:
        lines = (folder / "vocab.txt").read_text().splitlines()
        self.index = {token: i for i, token in enumerate(lines)}

    def ids(self, reaction: str) -> Tensor:
        tokens = TOKEN.findall(reaction)
        assert "".join(tokens) == reaction
        return torch.tensor([[self.index[token] for token in ("[CLS]", *tokens, "[SEP]")]])


@pytest.fixture(scope="module")
def classifier() -> tuple[nn.Module, Vocabulary]:
    folder = files_of("rxnfp", "bert_ft_10k_25s")
    config = transformers.BertConfig.from_pretrained(folder)
    config.num_labels = 50
    model = transformers.BertForSequenceClassification(config)
    model.load_state_dict(weights(folder))
    return model.eval(), Vocabulary(folder)


def test_reaction_classifier_against_the_fused_call_written_out(classifier) -> None:
    model, vocabulary = classifier
    ids = vocabulary.ids(REACTIONS[0])
    with oracles.exposed_fused_attention() as kept:
        maps = oracles.maps_from(lambda: model(ids).logits, kept, (41,))
    assert len(maps) == 12
    expected = oracles.read_row(oracles.propagate(maps), 0)
    method = GenericAttention(model)
    laws.assert_same(method.attribute(ids, 41), expected, 1e-3)
    assert laws.used_modules(method.relevance(ids, 41)) == [
        f"bert.encoder.layer.{i}.attention.self" for i in range(12)
    ]


@torch.no_grad()
def probability(model: nn.Module, ids: Tensor, target: int) -> Tensor:
    return model(ids).logits.softmax(-1)[:, target]


@pytest.mark.parametrize("fraction", [0.1, 0.2, 0.3])
def test_masking_the_highest_tokens_hurts_more_than_masking_random_ones(
    classifier, fraction: float
) -> None:
    """Paired over reactions: drop of p(class), ours minus the mean of 30 random choices.

    With a bootstrap interval (95 %, 10 000 draws) of the mean difference above zero.
    """
    model, vocabulary = classifier
    method = GenericAttention(model)
    generator = torch.Generator().manual_seed(0)
    differences = []
    for reaction in REACTIONS:
        ids = vocabulary.ids(reaction)
        with torch.no_grad():
            target = int(model(ids).logits.argmax())
        before = probability(model, ids, target)
        assert before > 0.99, f"the classifier is not sure of {reaction}"
        inner = ids.shape[1] - 2
        count = max(1, round(fraction * inner))
        ranked = method.attribute(ids, target)[0, 1:-1].topk(count).indices + 1
        random = [torch.randperm(inner, generator=generator)[:count] + 1 for _ in range(30)]
        masked = ids.repeat(31, 1)
        for row, places in zip(masked, [ranked, *random], strict=True):
            row[places] = vocabulary.index["[MASK]"]
        drops = before - probability(model, masked, target)
        differences.append(drops[0] - drops[1:].mean())
    paired = torch.stack(differences)
    draws = torch.randint(len(paired), (10_000, len(paired)), generator=generator)
    means = paired[draws].mean(dim=1).sort().values
    low, high = means[250].item(), means[9749].item()
    assert low > 0, f"mean {paired.mean():.3f}, 95 % interval [{low:.3f}, {high:.3f}]"


@pytest.mark.ci_sample
def test_shared_layer_gives_one_record_per_call() -> None:
    """Rxnmapper's ALBERT calls one attention module twelve times."""
    folder = files_of("rxnmapper", "albert_heads_8_uspto_all_1310k")
    config = transformers.AlbertConfig.from_pretrained(folder)
    model = transformers.AlbertForMaskedLM(config)
    missing, _ = model.load_state_dict(weights(folder), strict=False)
    assert not [name for name in missing if "attention" in name]
    model = model.eval().double()
    ids = Vocabulary(folder).ids(REACTIONS[0])
    position = 5
    target = int(ids[0, position])

    with oracles.exposed_fused_attention() as kept:
        maps = oracles.maps_from(lambda: model(ids).logits[:, position], kept, (target,))
    assert len(maps) == 12
    relevance = GenericAttention(model).relevance(ids, (position, target))
    name = "albert.encoder.albert_layer_groups.0.albert_layers.0.attention"
    assert laws.used_modules(relevance) == [name] * 12
    assert {call.heads for call in relevance.calls} == {8}
    laws.assert_same(relevance.matrix("input_ids", "input_ids"), oracles.propagate(maps), 1e-8)
    expected = oracles.read_row(oracles.propagate(maps), position)
    values = GenericAttention(model).attribute(ids, (position, target))
    laws.assert_same(values, expected, 1e-8)
    last = GenericAttention(model, start_layer=-1).attribute(ids, (position, target))
    laws.assert_same(last, oracles.read_row(oracles.propagate(maps[-1:]), position), 1e-8)
