"""The original models of pulled data. They do not travel: many may not be passed on, and all are large.

Their manifests do, with the digest that everything else was made from. `restore` gets a missing model from where its
author got it and checks that it is the same.
"""

import contextlib
import shutil
import subprocess
import sys
from collections.abc import Collection, Iterator
from pathlib import Path

from windquant import atomic, integrity, manifest, settings
from windquant.atomic import manifest_path
from windquant.errors import WindquantError
from windquant.manifest import Manifest
from windquant.reproduce import records
from windquant.reproduce.records import Record
from windquant.reproduce.travel import MODELS, TRAVELLING_MODELS, TRAVELLING_RECORDS


def save(root: Path, artifacts: Collection[str]) -> dict[str, Record]:
    """Put the manifests of the finished models where they travel; Snakemake's records of those that are not here.

    Those stay, as they came, while one of the `artifacts` was made from them: a clone may do without the models.
    """
    folder = root / TRAVELLING_MODELS
    here = {path.name for path in (root / MODELS).glob("*.manifest.json")}
    used, kept = set(_used(root, artifacts)), set()
    for path in sorted(folder.glob("*.manifest.json")):
        artifact = str(MODELS / path.name.removesuffix(".manifest.json"))
        if path.name not in here and artifact in used:
            kept.add(artifact)
        elif path.name not in here:
            path.unlink()
    for name in sorted(here):
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(root / MODELS / name, folder / name)
    came: dict[str, Record] = {}
    with contextlib.suppress(WindquantError):  # without records Snakemake gets a model anew, no more
        came = records.load(root / TRAVELLING_RECORDS)
    return {name: record for name, record in came.items() if name.removesuffix(".manifest.json") in kept}


def _used(root: Path, artifacts: Collection[str]) -> Iterator[str]:
    """The paths of what the artifacts were made from."""
    for name in artifacts:
        with contextlib.suppress(WindquantError):
            if manifest_path(root / name).is_file():
                yield from (entry["path"] for entry in Manifest.load(root / name).inputs.values())


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
