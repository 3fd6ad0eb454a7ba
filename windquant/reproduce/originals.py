"""The original models of pulled data. They do not travel: many may not be passed on, and all are large.

Their manifests do, with the digest that everything else was made from. `restore` gets a missing model from where its
author got it and checks that it is the same.
"""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from windquant import atomic, integrity, manifest, settings
from windquant.atomic import manifest_path
from windquant.errors import WindquantError
from windquant.manifest import Manifest
from windquant.reproduce.travel import MODELS, TRAVELLING_MODELS


def save(root: Path) -> None:
    """Put the manifests of the finished models where they travel."""
    shutil.rmtree(root / TRAVELLING_MODELS, ignore_errors=True)
    for path in sorted((root / MODELS).glob("*.manifest.json")):
        (root / TRAVELLING_MODELS).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, root / TRAVELLING_MODELS / path.name)


def restore(root: Path, fetch: bool) -> Iterator[str]:
    """Bring back what is missing, if `fetch`; one line per model that is not what the data were made from."""
    for travelling in sorted((root / TRAVELLING_MODELS).glob("*.manifest.json")):
        name = travelling.name.removesuffix(".manifest.json")
        artifact = root / MODELS / name
        document = Manifest.load(root / TRAVELLING_MODELS / name)
        try:
            if not artifact.exists() and fetch:
                _get(root, name, document)
            if not artifact.exists():
                yield f"{artifact}: not here; `make pull` gets it. A step that needs it would get it and make all anew"
            elif manifest.sha256(artifact) == document.output["sha256"]:
                atomic.write_text(manifest_path(artifact), travelling.read_text())
                integrity.remember(artifact)
            else:
                yield f"{artifact}: not the model that the data were made from; delete it and `make pull` again"
        except WindquantError as error:
            yield f"{artifact}: {error}"


def _get(root: Path, name: str, document: Manifest) -> None:
    """Run the step that made the model, at the revision that it got then."""
    print(f"getting the model {name}", file=sys.stderr, flush=True)
    values = dict(document.settings)
    if values.get("source") == "hub":
        values["revision"] = document.notes.get("revision") or values["revision"]
    command = [sys.executable, "-m", "windquant.models", "--output", str(MODELS / name), *settings.to_flags(values)]
    if subprocess.run(command, cwd=root).returncode:  # it shows its progress, and its own reason
        raise WindquantError("could not be got, see above")
