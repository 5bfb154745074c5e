"""What docs/hub.md shows is what works."""

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs/hub.md"


def test_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = PAGE.read_text(encoding="utf-8")
    names = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(block, names)
    assert names["model"] is names["dense"] and "save_pretrained" in vars(names["model"])
    listed = set(re.findall(r"`([\w.]+\.(?:json|md|py|safetensors))`", text.split("## Four ways")[0]))
    assert {file.name for file in (tmp_path / "my-model").iterdir()} <= listed
