"""One page of several studies: complete, self-contained, well-formed."""

from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch import nn

import mupass

VOID = {"meta", "br", "use", "path"}


class Checked(HTMLParser):
    """Elements in balance, anchors and what links to them, and what is taken from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.outside: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.ids.add(found.get("id") or "")
        if tag == "a":
            self.links.append(found["href"] or "")
        self.outside += [v for k, v in found.items() if k in ("src", "href") and v and not v.startswith("#")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def net(width: int = 128) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Linear(6, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3)
    return nn.Sequential(*layers)


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))
    return [(x, x[:, :3].argmax(1))]


def test_a_page_of_all_studies(tmp_path: Path) -> None:
    check = mupass.coord_check(net, batches(), widths=[32, 64], steps=1, seeds=2)
    found = mupass.sweep(net, batches(), [0.01, 0.03], [32, 64], steps=2, progress=False)
    ready = mupass.transfer(
        net(), batches(), grid={"lr": [0.1, 0.2]}, proxy=32, optimizer="shampoo", steps=2, progress=False
    )
    plan = ready.model.mupass_plan
    path = mupass.report(tmp_path / "all.html", check, found, ready, plan, title="a < b")
    page = Checked()
    page.feed(Path(path).read_text(encoding="utf-8"))
    assert not page.open and not page.outside
    assert len(page.links) == 4 and all(link[1:] in page.ids for link in page.links)
    for verdict in (check.verdict(), found.verdict(), ready.verdict()):
        assert page.text.count(verdict) == 2  # at the top and in its place
    assert page.text.count("a < b") == 2
    # The plan of the optimizer that is used, and the one that was asked for.
    assert str(plan.for_optimizer(ready.optimizer.spec)) in page.text and str(plan) in page.text


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(mupass.StudyError, match="at least one study"):
        mupass.report(tmp_path / "a.html")
    with pytest.raises(mupass.StudyError, match="no page for Linear"):
        mupass.report(tmp_path / "a.html", nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(mupass.StudyError, match=r"written as \.html"):
        mupass.report(tmp_path / "a.pdf", mupass.transform(net()).mupass_plan)
    assert not list(tmp_path.iterdir())


def test_every_study_is_headed_by_its_case_and_sweeps_stand_side_by_side(tmp_path: Path) -> None:
    sweeps = []
    for parameterization in ("mup", "standard"):
        sweeps.append(
            mupass.sweep(
                net, batches(), [0.01, 0.03], [32, 64], steps=2, progress=False, optimizer="adam",
                parameterization=parameterization,
            )
        )  # fmt: skip
    page = Path(mupass.report(tmp_path / "two.html", *sweeps)).read_text(encoding="utf-8")
    assert "<h1>Sweep: adam, mup</h1>" in page and "<h1>Sweep: adam, standard</h1>" in page
    assert page.count("Sweeps side by side") == 1
    one = Path(mupass.report(tmp_path / "one.html", sweeps[0])).read_text(encoding="utf-8")
    assert "side by side" not in one


def test_sweeps_of_different_things_are_not_laid_side_by_side() -> None:
    from mupass._study.sweep_result import comparable

    rates = mupass.sweep(net, batches(), [0.01, 0.03], [32], steps=1, progress=False)
    losses = mupass.sweep(
        net(),
        batches(),
        [0.01, 0.03],
        [32],
        steps=1,
        progress=False,
        evaluate=lambda m: m(batches()[0][0]).sum(),
    )
    assert comparable([rates, rates]) == [[rates, rates]]
    assert comparable([rates, losses]) == [] and comparable([rates]) == []
    # Two tasks on one page: each has axes of its own.
    assert comparable([losses, rates, losses, rates]) == [[losses, losses], [rates, rates]]
