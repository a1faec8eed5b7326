"""What registration and promotion write is what serving reads."""

from __future__ import annotations

from tasks.lifecycle import champions, model_file
from tasks.lifecycle.champion import Change
from tasks.lifecycle.model_file import Program, Signature, Tensor
from tasks.serving import published
from training.s3.objectstore import Store


def test_a_kept_version_that_became_champion(store: Store) -> None:
    tensor = Tensor(dtype="float32", shape=(-1, 3))
    kept = model_file.keep(
        store,
        "m",
        "1",
        run_key="r",
        weights_sha256="w",
        dataset_digest="d",
        fetch=lambda: Program(data=b"a program", signature=Signature(inputs=tensor, outputs=tensor)),
    )
    change = Change(action="first", version="1", run_key="r", model_sha256=kept.model_sha256, by="registration")
    champions.begin(store, "m", change)
    champion = published.find_champion(store, "m")
    found = published.of_champion(store, "m", champion)
    assert found == kept
    assert published.changed_champion(store, "m", etag=champion.etag) is None
