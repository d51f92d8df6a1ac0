"""Make ``docs/llms.txt``, a map of the documentation for language models: ``python docs/examples/llms.py``. The build of the pages does too.

What it says of each how-to page is on their index, and what it says of each name is the first sentence of its docstring.
"""

from __future__ import annotations

import inspect
import re
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

DOCS = Path(__file__).parents[1]
FILE = DOCS / "llms.txt"
WITH_MEMBERS = ("Recording", "Recorder", "Layer", "Stats", "Comparison")
MODULES = (
    "actrec",
    "actrec.data",
    "actrec.reduce",
    "actrec.plot",
    "actrec.store",
    "actrec.testing",
)

HEAD = """# actrec

> Records what the layers of any PyTorch model compute: exactly, never silently wrong, nearly free. One context manager, \
`record(model, layers)`, and a read-only mapping from layer name to the list of its calls.

```python
from actrec import compare, load, record

with torch.no_grad(), record(model, ["conv1", "layer4.*"]) as acts:  # names, wildcards, regex, types, modules, functions
    for batch in loader:
        model(batch)

acts["conv1"]          # a list: one value for each call of the layer
acts["conv1"][0]       # what the first call returned, exactly, whatever the model did to it afterwards
acts["conv1"].cat()    # all calls, joined along the batch
acts.cat()             # a dict of them
print(acts)            # a table: layer, type, calls, shape, dtype, memory
acts.save("run")       # later: load("run")
```

- `acts[name]` is a list of calls, not a tensor: `acts[name].cat().mean()`, not `acts[name].mean()`.
- The model is called inside the block by your own code; `record` does not call it. When the block ends, no hook is left.
- Options, keyword-only: `transform=` (what to keep of a value), `inputs=`, `grads=` (`acts.inputs`, `acts.grads`), `detach=`, `device=`, `dtype=`,
  `stop_early=` (later layers do not run, the model returns None), `into=` (a path: stream to the disk), `resume=`.
- Wrong guesses raise with what to write instead, and a chosen layer that was never called warns.
"""


def llms() -> str:
    """Return the text of the file."""
    pages = [
        "- [Tutorial](tutorial.html): record a network, look inside, fit a probe, save",
        "- [Cookbook](cookbook.html): short snippets: NumPy, pandas, CSV, histogram, probe, PCA, cosine similarity, Hugging Face, last token, mean pool",
        "- [record()](reference/record.html): all layer queries and options",
        "- [Recordings](reference/recordings.html): what a recording and a layer can do",
        "- [Statistics, comparison, plots, the command line](reference/looking.html)",
        "- [Format](reference/format.html): what is in a stored recording, and 20 lines that read it without actrec",
        "- [Speed](why/speed.html): what recording costs",
        "- [Why](why/index.html): what is copied, what counts as a call, what cannot be recorded",
        "- [Stability](stability.html): what is public, deprecations, formats, security",
    ]
    return "\n".join([HEAD, "## Pages", "", *pages, "", "## How to", "", *_how_to(), "", *_names()])


def _how_to() -> Iterator[str]:
    for line in (DOCS / "how-to" / "index.md").read_text().splitlines():
        if line.startswith("- ["):
            yield re.sub(r"\]\(([\w-]+)\.md\)", r"](how-to/\1.html)", line)


def _names() -> Iterator[str]:
    for module in map(import_module, MODULES):
        yield f"## {module.__name__}"
        yield ""
        public = {name: getattr(module, name) for name in module.__all__}
        for name in sorted(public, key=lambda name: (not inspect.isfunction(public[name]), name)):
            if inspect.isfunction(public[name]) or inspect.isclass(public[name]):
                yield f"- `{name}`: {_first_sentence(inspect.getdoc(public[name]))}"
            if name in WITH_MEMBERS:
                yield from _members(public[name])
        yield ""


def _members(public: type) -> Iterator[str]:
    """Say what a class can do, with what it inherits, but for what is said of another class."""
    said = {
        name for base in public.__mro__[1:] if base.__name__ in WITH_MEMBERS for name in dir(base)
    }
    mine = [base for base in public.__mro__ if base.__module__.startswith("actrec.")]
    members = {name: member for base in reversed(mine) for name, member in vars(base).items()}
    for name, member in members.items():
        is_method = inspect.isfunction(member)
        described = inspect.getdoc(member) if is_method or isinstance(member, property) else None
        if described and not name.startswith("_") and name not in said:
            shown = f"{public.__name__}.{name}{'()' if is_method else ''}"
            yield f"  - `{shown}`: {_first_sentence(described)}"


def _first_sentence(docstring: str) -> str:
    """Return the first paragraph in one line, as Markdown."""
    first, _, _ = docstring.partition("\n\n")
    return re.sub(r":\w+:(?=`)", "", " ".join(first.split())).replace("``", "`")


if __name__ == "__main__":
    FILE.write_text(llms())
