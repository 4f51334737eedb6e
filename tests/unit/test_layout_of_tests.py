"""Every module of the product is imported by a test of its own name, or stands in a list with what tests it instead.

tests/unit mirrors the packages: workflows/serve/engine.py is tested by tests/unit/serve/test_engine.py, and
mlmamba/mamba2.py by tests/unit/mlmamba/test_mamba2.py.
"""

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent
PACKAGES = ("mlmamba", "pipelines", "workflows")

NOT_ALONE = {
    "mlmamba.auto": "unit/mlmamba/test_auto.py: imported by the package, as users do",
    "mlmamba.blocks": "unit/mlmamba/test_attention.py: its errors, through the config",
    "mlmamba.chat_template": "unit/mlmamba/test_chat_template.py: rendered through the processor",
    "mlmamba.checks": "unit/mlmamba/test_bad_input.py: its errors, through what calls it",
    "mlmamba.choosing": "unit/mlmamba/test_decoding.py: imports it",
    "mlmamba.configuration": "unit/mlmamba/test_connector.py: imports it",
    "mlmamba.connectors.base": "unit/mlmamba/test_connector.py: built through mlmamba.connector",
    "mlmamba.connectors.msc": "unit/mlmamba/test_connector.py: built through mlmamba.connector",
    "mlmamba.connectors.plain": "unit/mlmamba/test_connector.py: built through mlmamba.connector",
    "mlmamba.connectors.scan": "unit/mlmamba/test_connector.py: built through mlmamba.connector",
    "mlmamba.connectors.vss": "unit/mlmamba/test_connector.py: built through mlmamba.connector",
    "mlmamba.convert.families": "unit/mlmamba/test_convert_families.py: through read_language_model",
    "mlmamba.convert.folders": "unit/mlmamba/test_convert.py: through the command",
    "mlmamba.convert.gguf_file": "unit/mlmamba/test_convert_gguf.py: imports it",
    "mlmamba.convert.language": "unit/mlmamba/test_convert.py: through the command",
    "mlmamba.convert.layouts": "unit/mlmamba/test_convert.py: imports it",
    "mlmamba.convert.released": "unit/mlmamba/test_convert_released.py: imports it",
    "mlmamba.generation": "unit/mlmamba/test_generation.py: through model.generate",
    "mlmamba.image_processing": "unit/mlmamba/test_processing.py: through the processor",
    "mlmamba.modeling": "unit/mlmamba/test_modeling.py: through the tiny model of tests/helpers/tiny.py",
    "mlmamba.ops.chunked": "unit/mlmamba/test_ops.py: imports it",
    "mlmamba.ops.compiled": "unit/mlmamba/test_decoding.py: imports it",
    "mlmamba.ops.convolution": "unit/mlmamba/test_ops.py: imports it",
    "mlmamba.ops.cuda": "interpreter/test_operators.py: through mlmamba.ops, interpreted",
    "mlmamba.ops.linear": "unit/mlmamba/test_ops.py: through mlmamba.ops",
    "mlmamba.ops.naive": "unit/mlmamba/test_ops.py: imports it",
    "mlmamba.ops.packed": "unit/mlmamba/test_decoding.py: imports it",
    "mlmamba.ops.step": "interpreter/test_decoding.py: imports it",
    "mlmamba.selective_scan": "unit/mlmamba/test_mamba2.py: imports it",
    "mlmamba.state": "unit/mlmamba/test_mamba2.py: imports it",
    "pipelines.alike": "integration/test_prepare_mixture.py: through prepare",
    "pipelines.contact_sheet": "unit/pipelines/test_inspect.py: imports it",
    "pipelines.exclusion": "unit/pipelines/test_dedup.py: imports it",
    "pipelines.manifest": "unit/pipelines/test_reader.py: imports it",
    "pipelines.pack": "unit/pipelines/test_dedup.py: imports it",
    "pipelines.packed": "unit/pipelines/test_inspect.py: imports it",
    "pipelines.prepare": "integration/test_damaged_corpus.py: imports it",
    "pipelines.quarantine": "unit/pipelines/test_dedup.py: imports it",
    "pipelines.records": "unit/pipelines/test_dedup.py: imports it",
    "pipelines.schema": "unit/pipelines/test_dedup.py: imports it",
    "pipelines.sheet_text": "unit/pipelines/test_inspect.py: imports it",
    "pipelines.shuffle": "unit/pipelines/test_planner.py: imports it",
    "pipelines.source_config": "unit/pipelines/test_config.py: imports it",
    "pipelines.sources.annotations": "unit/pipelines/sources/test_sources.py: opened by their type",
    "pipelines.sources.captions": "unit/pipelines/sources/test_sources.py: opened by their type",
    "pipelines.sources.easy_vqa": "unit/pipelines/sources/test_sources.py: imports it",
    "pipelines.sources.entries": "unit/pipelines/sources/test_sources.py: opened by their type",
    "pipelines.sources.files": "unit/pipelines/sources/test_archives.py: imports it",
    "pipelines.sources.images": "unit/pipelines/sources/test_archives.py: imports it",
    "pipelines.sources.json_cut": "unit/pipelines/sources/test_fragments.py: imports it",
    "pipelines.sources.json_buffer": "unit/pipelines/sources/test_json_stream.py: imports it",
    "pipelines.sources.open": "unit/pipelines/sources/test_sources.py: imports it",
    "pipelines.sources.parquet": "unit/pipelines/sources/test_archives.py: opened by their type",
    "pipelines.sources.source": "unit/pipelines/sources/test_sources.py: opened by their type",
    "pipelines.sources.webdataset": "unit/pipelines/sources/test_archives.py: opened by their type",
    "pipelines.sources.zip_index": "unit/pipelines/sources/test_archives.py: imports it",
    "workflows.cli": "unit/verbs/test_cli.py: imports it",
    "workflows.console": "unit/evaluate/test_results.py: imports it",
    "workflows.evaluate.answer": "integration/test_version_0_1.py: packages of version 0.1 import it",
    "workflows.evaluate.benchmarks.base": "unit/evaluate/test_collect.py: imports it",
    "workflows.evaluate.benchmarks.gqa": "unit/evaluate/test_rules.py: imports it",
    "workflows.evaluate.benchmarks.own_data": "unit/evaluate/test_results.py: through a recipe's test sources",
    "workflows.evaluate.benchmarks.pope": "unit/evaluate/test_rules.py: imports it",
    "workflows.evaluate.benchmarks.textvqa": "unit/evaluate/test_benchmarks.py: opened by its name",
    "workflows.evaluate.benchmarks.vqav2": "unit/evaluate/test_benchmarks.py: opened by its name",
    "workflows.evaluate.benchmarks.vsr": "unit/evaluate/test_rules.py: imports it",
    "workflows.evaluate.intervals": "unit/evaluate/test_report.py: imports it",
    "workflows.evaluate.scoring": "unit/evaluate/test_results.py: imports it",
    "workflows.evaluate.probe_report": "unit/evaluate/test_probe.py: imports it",
    "workflows.evaluate.questions": "unit/evaluate/test_benchmarks.py: imports it",
    "workflows.evaluate.run": "unit/evaluate/test_results.py: imports it",
    "workflows.plan.data": "unit/plan/test_plan.py: imports it",
    "workflows.plan.cost": "unit/plan/test_memory.py: imports it",
    "workflows.plan.text": "unit/plan/test_plan.py: through the command",
    "workflows.plan.train": "unit/plan/test_plan.py: imports it",
    "workflows.recipe.evaluate": "unit/recipe/test_load.py: imports it",
    "workflows.recipe.model": "unit/mlmamba/test_connector.py: imports it",
    "workflows.recipe.schema": "unit/recipe/test_data_recipes.py: imports it",
    "workflows.recipe.train": "unit/train/test_stage.py: imports it",
    "workflows.registry.models": "integration/test_registry_server.py: imports it",
    "workflows.registry.promote": "unit/registry/test_promote.py: through workflows.registry",
    "workflows.registry.register": "integration/test_registry_register.py: imports it",
    "workflows.registry.show": "integration/test_registry.py: through the command",
    "workflows.rerun": "integration/test_workflow.py: imports it",
    "workflows.run": "unit/test_preflight.py: imports it",
    "workflows.serve.batch": "unit/serve/test_engine.py: through the engine",
    "workflows.serve.deployment": "unit/serve/test_start.py: imports it",
    "workflows.serve.metrics": "unit/serve/test_request_log.py: imports it",
    "workflows.serve.options": "unit/serve/test_engine.py: imports it",
    "workflows.serve.sequence": "unit/serve/test_engine.py: imports it",
    "workflows.serve.service": "unit/serve/test_swap.py: imports it",
    "workflows.storage.layout": "unit/recipe/test_load.py: imports it",
    "workflows.storage.remote": "unit/storage/test_folder.py: through Folder",
    "workflows.submit.client": "integration/test_submit_cluster.py: through the command",
    "workflows.submit.start": "integration/test_submit_cluster.py: through the command",
    "workflows.train.trainer": "unit/train/test_checks.py: imports it",
    "workflows.train.export": "integration/test_train_stages.py: in training workers",
    "workflows.train.job": "integration/test_train_exact.py: in training workers",
    "workflows.train.loop": "integration/test_train_exact.py: in training workers",
    "workflows.train.optim": "unit/train/test_stage.py: imports it",
    "workflows.train.reshard": "integration/test_train_reshard.py: imports it",
    "workflows.train.restore": "integration/test_train_exact.py: in training workers",
    "workflows.train.validation": "integration/test_train_stages.py: in training workers",
    "workflows.verbs.evaluate": "unit/verbs/test_cli.py: through the parser",
    "workflows.verbs.find_rate": "integration/test_train_rates.py: through the command",
    "workflows.verbs.models": "unit/verbs/test_cli.py: through the parser",
    "workflows.verbs.serve": "unit/verbs/test_cli.py: through the parser",
    "workflows.verbs.submit": "unit/verbs/test_cli.py: through the parser",
    "workflows.verbs.tools": "unit/verbs/test_cli.py: through the parser",
    "workflows.verbs.verb": "unit/verbs/test_cli.py: through the parser",
    "workflows.verbs.workflow": "unit/verbs/test_cli.py: through the parser",
}
"""Modules without a test of their own name: which test file tests each, from tests/ on, and in what way."""


def modules() -> dict[str, Path]:
    """Every module of the product by its dotted name, packages' own files left out."""
    files = [file for package in PACKAGES for file in (ROOT / package).rglob("*.py") if file.name[0] != "_"]
    return {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in files}


def own_test(module: str) -> Path:
    """Where a test of the module's own name is."""
    *rooms, name = module.removeprefix("workflows.").split(".")
    return TESTS.joinpath("unit", *rooms, f"test_{name}.py")


def imported(file: Path) -> set[str]:
    """Dotted names that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def has_own_test(module: str) -> bool:
    file = own_test(module)
    return file.is_file() and module in imported(file)


def test_every_module_has_a_test_of_its_own_name_or_is_listed():
    assert [name for name in modules() if name not in NOT_ALONE and not has_own_test(name)] == []


def test_the_list_names_only_modules_that_need_it():
    known = modules()
    assert [name for name in NOT_ALONE if name not in known or has_own_test(name)] == []


@pytest.mark.parametrize("module", NOT_ALONE)
def test_the_test_that_stands_in_exists(module):
    assert (TESTS / NOT_ALONE[module].partition(":")[0]).is_file()
