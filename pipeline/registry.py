"""An exported encoder in MLflow's model registry: an ONNX model, which loads without this project and without pickles."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline import mlflow_store as store
from pipeline.config import Recipe
from pipeline.errors import StageError
from pipeline.sender import Position
from pipeline.tracking import store_uri

_LIMIT = 1800.0  # seconds: a large model over a slow line


def register(
    recipe: Recipe, folder: Path, onnx: Mapping[str, Any], *, name: str, about: Mapping[str, Any]
) -> dict[str, str]:
    """Make the ONNX file a version of the registered model `name`; gives name, version and how to load it.

    `folder` is that of the export, whose MLflow run keeps the files. `onnx` is what `export_onnx` gave, with its path;
    `about` become tags of the version. Raises StageError where MLflow does not take it.
    """
    uri = store_uri(recipe)
    run_id = Position.of(folder).run_id
    where = store.without_password(uri)
    again = f"the encoder is in {folder}, and the same call tries again"
    if not run_id:
        raise StageError(f"export.registry={name}: MLflow at {where} does not answer; {again}")

    def send() -> str:
        with tempfile.TemporaryDirectory(prefix="wavemim-") as room:
            model = Path(room) / "model"
            store.save_onnx(Path(onnx["path"]), model, shape=onnx["input"], features=onnx["features"], about=about)
            return store.register_version(store.connect(uri, create=False), run_id, name, model, about)

    store.import_mlflow()
    try:
        version = store.within(_LIMIT, send)
    except Exception as error:  # of MLflow's many kinds
        raise StageError(f"export.registry={name}: MLflow at {where}: {store.reason(error)}; {again}") from error
    return {"name": name, "version": version, "load": f"mlflow.pyfunc.load_model('models:/{name}/{version}')"}
