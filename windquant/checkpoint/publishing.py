"""Upload a packed checkpoint to the Hugging Face Hub, with a card that states bits, plan, perplexity and the command.

python -m windquant publish data/checkpoints/NAME/quantized user/name --result results/NAME.json
"""

import argparse
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from windquant import manifest, naming, result_file
from windquant.checkpoint.card import card
from windquant.checkpoint.files import check, check_plan, measure, read_config
from windquant.errors import WindquantError
from windquant.header import weight_files
from windquant.plan import Plan


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m windquant publish", description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="folder of a packed checkpoint")
    parser.add_argument("repository", help="on the Hub, e.g. user/name; made if it is not there")
    parser.add_argument("--result", type=Path, required=True, help="the workflow's JSON about this checkpoint")
    parser.add_argument("--private", action="store_true", help="make a repository that only you see")
    parser.add_argument("--folder", type=Path, help="write what would be uploaded here, and upload nothing")
    options = parser.parse_args(arguments)
    if options.folder:
        gather(options.checkpoint, options.result, options.folder)
        print(f"written to {options.folder}; nothing was uploaded")
        return
    with tempfile.TemporaryDirectory() as scratch:
        gather(options.checkpoint, options.result, Path(scratch) / "model")
        upload(Path(scratch) / "model", options.repository, options.private)


def gather(checkpoint: Path, result: Path, folder: Path) -> None:
    """A copy of the checkpoint, its card completed. WindquantError if it is damaged or the result is of another one."""
    if folder.exists():
        raise WindquantError(f"{folder}: exists; give a folder that does not")
    _, layouts = read_config(checkpoint)
    check(layouts, weight_files(checkpoint))
    plan = Plan.load(checkpoint / "plan.json")
    check_plan(layouts, plan, checkpoint / "plan.json")
    measured = measure(checkpoint)
    found = result_file.load(result)
    same = (found["model"], found["allocator"], found["effective_bits"])
    if same != (plan.model, plan.allocator, measured.effective_bits):
        raise WindquantError(
            f"{result}: is of {same[0]} by {same[1]} at {same[2]:.4f} bits, the checkpoint of {plan.model} by "
            f"{plan.allocator} at {measured.effective_bits:.4f}; give its own result"
        )
    beside = checkpoint / "result.json"  # `python -m windquant quantize` has put it there, and changed the digest so
    if beside.is_file():
        own = beside.read_bytes() == result.read_bytes()
    else:
        own = manifest.sha256(checkpoint) == found["data"]["quantized"]
    if not own:
        raise WindquantError(f"{result}: is of a checkpoint with the same plan and other content; give its own result")
    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns(".*"))
    bits = measured.effective_bits, measured.checkpoint_bits
    text = card(plan, layouts, *bits, measured.measured_bytes, found, command(plan, found["seed"], result))
    (folder / "README.md").write_text(text, encoding="utf-8")


def command(plan: Plan, seed: int, result: Path) -> str:
    """The workflow's command for a result. Under a name of its own a file does not tell the change of an ablation."""
    name = result.name
    if naming.variant_of(result) is None:
        variant = naming.Variant(plan.allocator, seed=seed or None)
        name = naming.result_name(plan.model, float(plan.target_bits), variant.name)
    return f"snakemake --cores all results/{name}"


def upload(folder: Path, repository: str, private: bool) -> None:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        done = api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Packed by windquant")
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise WindquantError(
            f"{repository}: the Hub does not take it ({reason}); log in with `hf auth login`, check name and network"
        ) from error
    print(done)
