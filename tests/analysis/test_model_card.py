"""Cards of hostile facts: their front matter is the library's, their body that of an ordinary card."""

import re
from pathlib import Path

import pytest
import yaml
from hostile import NAMES, PIECES, shown
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st
from rendered import RENDERERS, read

from miniplm.analysis.evaluation import Evaluation
from miniplm.analysis.model_card import CardFacts, model_card
from miniplm.analysis.provenance import read_provenance
from miniplm.config import ExportConfig
from miniplm.runtime.errors import UserError

LOSSES = {"rows": 3, "non_finite_rows": 0, "tokens": 90, "loss": 2.5, "perplexity": 12.18}
OPTIMIZER = {
    "lr": 3e-3,
    "min_lr_ratio": 0.1,
    "warmup_steps": 20,
    "betas": [0.9, 0.98],
    "eps": 1e-6,
    "weight_decay": 0.01,
    "max_grad_norm": 1.0,
}


def manifest(name: str) -> dict:
    """Of a training output, with this name in every place that data names."""
    selection = {"rule": {"ratio": 0.5}, "kept": 5, "dropped": 5, "kept_tokens": 50, "dropped_tokens": 50}
    return {
        "complete": True,
        "identity": {
            "corpus": name,
            "optimizer": OPTIMIZER,
            "steps": 150,
            "batch_tokens": 4096,
            "shuffle": True,
            "seed": 10,
            "document_mask": False,
            "dtype": name,
            "teacher": name,
            "alpha": 0.5,
            "temperature": 1.0,
        },
        "teacher": name,
        "parameters": 1000,
        "corpus": {
            "source": name,
            "fingerprint": name,
            "rows": 5,
            "tokens": 50,
            "max_length": 16,
            "domains": {name: {}},
            "selection": selection,
            "scores": [{"teacher": name, "reference": name}],
        },
    }


def make_card(
    name: str,
    front: str = "en",
    location: str = "model",
    domains: dict | None = None,
    predicted: dict | None = None,
) -> str:
    """The card with `name` in every place of the body, and `front` in the front matter; of a selection by
    predicted scores, if they are."""
    evaluation = Evaluation(
        **LOSSES,
        model=name,
        weights=name,
        corpus=name,
        source=name,
        document_mask=False,
        dtype=name,
        domains={name: LOSSES} if domains is None else domains,
    )
    found = manifest(name)
    found["corpus"]["scores"][0] |= {"predicted": predicted} if predicted else {}
    provenance = read_provenance(found, "manifest.json")
    losses = {"loss": (150, 2.25), "eval_loss": (150, None)}
    architecture = {"architectures": [name], "hidden_size": 32, "intermediate_size": [1, 2]}
    facts = CardFacts(name, architecture, provenance, 150, 4096, losses, evaluation)
    config = ExportConfig(
        checkpoint="x", output="y", license=front, language=[front], datasets=[front], name="name"
    )
    return model_card(config, facts, location)


def split(card: str) -> tuple[str, str]:
    """(front matter, body); the library reads the same front matter."""
    front, body = re.fullmatch(r"---\n(.*?)\n---\n(.*)", card, re.S).groups()
    assert yaml.safe_load(front) == ModelCard(card).data.to_dict()
    return front, body


ORDINARY = make_card("name")


def check(name: str, renderer: str):
    card = make_card(name)
    assert card.replace("\n", "").isprintable()
    elements, texts = read(split(card)[1], renderer)
    assert elements == read(split(ORDINARY)[1], renderer)[0]
    cells = [text for tag, text in texts if tag in ("h1", "td")]
    assert cells.count(shown(name)) >= 4 or not shown(name)  # title, teacher, reference model, domain


@pytest.mark.slow
@pytest.mark.parametrize("renderer", RENDERERS)
def test_hostile_names_add_nothing_to_a_card(renderer):
    for name in NAMES:
        check(name, renderer)


@pytest.mark.slow
@pytest.mark.parametrize("renderer", RENDERERS)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(PIECES) | st.characters(), min_size=1, max_size=30).map("".join))
def test_any_name_adds_nothing_to_a_card(renderer, name):
    check(name, renderer)


@pytest.mark.slow
def test_hostile_hashes_of_a_run_that_has_not_ended():
    def card(name):
        unfinished = {"complete": False, "identity": manifest(name)["identity"]}
        facts = CardFacts("name", {}, read_provenance(unfinished, "manifest.json"), 1, 1, {}, None)
        return split(model_card(ExportConfig(checkpoint="x", output="y"), facts, "model"))[1]

    for name in NAMES:
        elements, texts = read(card(name), "Python-Markdown")
        assert elements == read(card("name"), "Python-Markdown")[0]
        assert ("td", f"fingerprint {shown(name)}".strip()) in texts


@pytest.mark.slow
@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(PIECES), min_size=1, max_size=20).map("".join) | st.sampled_from(NAMES))
def test_front_matter_holds_any_text_as_a_value(text):
    text = text.replace("\0", "").encode(errors="ignore").decode() or "x"  # the rest the settings refuse
    card = make_card("name", front=text)
    front, body = split(card)
    assert front.isascii() and front.replace("\n", "").isprintable()
    assert body == split(ORDINARY)[1]
    found = ModelCard(card).data
    assert (found.license, found.language, found.datasets) == (text, [text], [text])
    assert yaml.safe_load(front).keys() == yaml.safe_load(split(ORDINARY)[0]).keys()


@pytest.mark.parametrize(
    "location", ["it's", 'a "b" \\', "```", "\n# x\n", "\udcff", "{{ x }}", "'); exit()#"]
)
def test_the_snippets_name_the_very_folder(location):
    card = make_card("name", location=location)
    snippets = re.findall(r"^```python\n(.*?)^```$", card, re.S | re.M)
    opened = []

    class Opened:
        @staticmethod
        def from_pretrained(name):
            opened.append(name)

    lines = [line for snippet in snippets for line in snippet.splitlines()]
    code = "\n".join(line for line in lines if "from_pretrained" in line or " = pipeline(" in line)
    names = {"AutoModelForCausalLM": Opened, "AutoTokenizer": Opened}
    exec(code, {**names, "pipeline": lambda task, model: opened.append(model)})
    assert opened == [location] * 3
    for renderer in RENDERERS:
        assert read(split(card)[1], renderer)[0] == read(split(ORDINARY)[1], renderer)[0]


@pytest.mark.parametrize(
    ("name", "linked"),
    [
        ("Qwen/Qwen1.5-1.8B", True),
        ("Qwen1.5-1.8B", False),
        ("a/b/c", False),
        ("a/..", False),
        ("a/b--c", False),
        ("a/b c", False),
        ("a/" + "b" * 200, False),
        ("a/b\n", False),
        ("javascript:alert(1)/x", False),
        ("ä/b", False),
    ],
)
def test_only_ids_of_the_hub_are_links(name, linked):
    for renderer in RENDERERS:
        elements, _ = read(split(make_card(name))[1], renderer)
        links = [element for element in elements if element.startswith("<a ")]
        ours = 3 * [f'<a href="https://huggingface.co/{name}">'] if linked else []  # teachers and reference
        assert links == ['<a href="https://arxiv.org/abs/2410.17215">', *ours]
    assert ("datasets" in ModelCard(make_card(name)).data.to_dict()) is True  # those that were given
    given = ExportConfig(checkpoint="x", output="y")
    facts = CardFacts("n", {}, read_provenance(manifest(name), "m"), 1, 1, {}, None)
    assert ModelCard(model_card(given, facts, "m")).data.datasets == ([name] if linked else None)


def test_predicted_scores_are_told():
    card = make_card("plain", predicted={"kind": "ngram", "spearman": 0.8391, "ratio": 0.5})
    (line,) = [line for line in card.splitlines() if line.startswith("| Predicted by")]
    assert "a linear model of hashed n-grams" in line and "0.839" in line
    assert "Predicted by" not in make_card("plain")
    with pytest.raises(UserError, match="predicted"):
        make_card("plain", predicted={"kind": "oracle", "spearman": 1.0})


def test_many_domains():
    domains = {f"site{number}": {**LOSSES, "tokens": number} for number in range(1, 3001)}
    card = make_card("name", domains=domains)
    assert "| site3000 |" in card and "| site2961 |" in card and "| site2960 |" not in card
    assert "| 2,960 smaller domains |" in card


def test_the_template_is_shipped():
    import miniplm

    assert (Path(miniplm.__file__).parent / "analysis" / "model_card.md.jinja").is_file()
