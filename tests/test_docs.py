"""What the pages say is what the package does: code runs, printed output is real, every name has an entry."""

import re
import subprocess
import sys
import warnings
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch
from ranks import free_port

import mupass

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "docs/quickstart.md", "docs/studies.md")
TUTORIALS = {"gpt2": "transformers", "vit": "timm"}
ZOO = {"timm", "transformers"}


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / page).read_text(encoding="utf-8"), re.M | re.S)


def needs(block: str) -> set[str]:
    return ZOO & set(re.findall(r"^import (\w+)", block, re.M))


def run(page: str, chosen: list[str]) -> dict[str, object]:
    namespace: dict[str, object] = {"__name__": "page"}
    for number, block in enumerate(chosen, 1):
        exec(compile(block, f"<{page}, block {number}>", "exec"), namespace)
    return namespace


@pytest.fixture
def alone(monkeypatch):
    """Let pages compile without a C++ compiler, and make a process group of one."""
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda m, **k: compiled(m, **{"backend": "aot_eager", **k}))
    settings = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "RANK": "0", "WORLD_SIZE": "1"}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    torch.manual_seed(0)
    yield
    torch.compiler.reset()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


# torch 2.13's Dynamo warns of autograd functions that it instantiates itself.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("page", PAGES)
def test_code_blocks_run(page, alone, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # pages write reports
    chosen = [b for b in blocks(page, "python") if not needs(b)]
    assert chosen
    run(page, chosen)


@pytest.mark.zoo
@pytest.mark.parametrize("library", sorted(ZOO))
def test_blocks_of_other_libraries_run(library, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what these libraries warn of on import is theirs
        pytest.importorskip(library)
        chosen = [b for page in PAGES for b in blocks(page, "python") if library in needs(b)]
        assert chosen
        run(library, ["import torch, mupass", *chosen])
    shown = capsys.readouterr().out
    assert shown.strip() == {"timm": "output", "transformers": "('d_model', '3*heads*head_dim')"}[library]


@pytest.mark.zoo
@pytest.mark.parametrize("page", TUTORIALS)
def test_tutorials_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what these libraries warn of on import is theirs
        pytest.importorskip(TUTORIALS[page])
        run(page, blocks(f"docs/tutorials/{page}.md", "python"))
    assert page != "gpt2" or (tmp_path / "gpt2_sweep.html").stat().st_size > 10_000


def test_the_report_in_the_readme_is_real():
    classifier = run("README.md", blocks("README.md", "python")[:1])["Classifier"]
    shown = next(b for b in blocks("README.md", "text") if b.startswith("Classifier: width"))
    with torch.device("meta"):
        model = classifier()
    assert mupass.analyze(model, base=64).report("sgd").text() == shown.rstrip()


@pytest.mark.slow
def test_the_evidence_on_the_concept_page_is_real():
    quoted = next(b for b in blocks("docs/concept.md", "text") if "evidence" in b).rstrip().splitlines()
    _, *facts = quoted
    attention = run("docs/quickstart.md", blocks("docs/quickstart.md", "python")[:2])
    model = mupass.transform(attention["Tiny"](d=512, heads=8), attention["ids"], base=256)
    said = model.mupass_plan.explain("block.qkv.weight").splitlines()
    assert [f.replace("blocks.0.qkv", "block.qkv") for f in facts] == said[1 : 1 + len(facts)]


@pytest.mark.parametrize("name", mupass.__all__)
def test_every_public_name_is_in_the_reference(name):
    page = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    assert re.search(rf"^::: mupass\.{name}$", page, re.M)


def test_the_reference_names_nothing_else():
    page = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^::: mupass\.(\w+)$", page, re.M)) == set(mupass.__all__)


def test_links_between_pages_lead_somewhere():
    pages = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")]
    for path in [*pages, *(ROOT / "docs").rglob("*.md")]:
        text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
            assert target.startswith("https://") or (path.parent / target).exists(), f"{path.name}: {target}"


def test_the_page_of_support_names_tests_that_are_there():
    text = (ROOT / "docs/support.md").read_text(encoding="utf-8")
    named = re.findall(r"`(tests/\w+\.py)(?:::(\w+))?`", text)
    assert len(named) > 10
    for path, test in named:
        source = (ROOT / path).read_text(encoding="utf-8")
        assert re.search(rf"^def {test or 'test_'}", source, re.M), f"{path}::{test}"


def test_the_picture_is_well_formed_and_needs_no_network():
    picture = (ROOT / "docs/pipeline.svg").read_text(encoding="utf-8")
    ElementTree.fromstring(picture)
    assert not re.search(r"(href|url|src)\s*[=(]\s*[\"']?https?:", picture)


def test_ci_runs_the_test_commands_of_the_readme():
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("**B. Run the tests.**")[2]
    short, rest = re.search(r"^pip install .*pytest$", section, re.M).group(), "pytest -m slow"
    steps = (ROOT / ".ci/run").read_text(encoding="utf-8").splitlines()
    assert short == 'pip install -e ".[dev]" && pytest' and rest in section.partition("## ")[0]
    assert steps.index(f"{short} || exit") < steps.index(rest) == len(steps) - 1


def test_the_oldest_torch_is_the_same_everywhere():
    (oldest,) = re.findall(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    for page in ("README.md", "docs/quickstart.md"):
        assert f"torch {oldest} or later" in (ROOT / page).read_text(encoding="utf-8"), page


def test_the_changelog_has_this_version():
    assert f"## {mupass.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_import_is_lean():
    """Nothing that an extra brings is imported, but for tqdm, which torch itself takes where it finds it."""
    code = "import sys, mupass; print(*sorted({m.partition('.')[0] for m in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    extras = {"matplotlib", "timm", "transformers", "torchvision", "mup", "pandas", "IPython", "mkdocs"}
    assert not extras & set(done.stdout.split())
