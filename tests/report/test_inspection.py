"""The page of an inspection with little or nothing to show."""

from __future__ import annotations

import torch
from torch import nn

import uncollapse
from uncollapse.inspection import Inspection
from uncollapse.report import inspection


def test_a_page_without_anything_says_so(tmp_path):
    page = inspection.write(
        tmp_path / "page.html", Inspection("Nothing", 0, absent={"attention": "looked for <heads>"})
    )
    html = page.read_text()
    assert "No attention was seen" in html
    assert "looked for &lt;heads&gt;" in html


def test_a_page_names_what_has_collapsed():
    torch.manual_seed(0)
    model = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(16, 2, 16, batch_first=True), 2, enable_nested_tensor=False
    ).eval()
    with torch.no_grad():
        model.layers[1].self_attn.in_proj_weight *= 60
        with uncollapse.watch(model) as seen:
            model(torch.randn(2, 12, 16))
    found = seen.result(weights=True)
    html = inspection.render(found, source="noise & more")
    collapsed = int(found.heads["layers.1.self_attn"].collapsed.sum())
    assert collapsed
    assert f"{collapsed} of 4 heads have collapsed" in html
    assert "noise &amp; more" in html
    assert "layers.1.self_attn" in html
    assert inspection.key_figures(found)["Collapsed heads"].startswith(str(collapsed))
