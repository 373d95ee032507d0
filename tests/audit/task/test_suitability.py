"""The audit with a model and a data set: adapters along the task's own gradient suit it, adapters beside it do not."""

import json

import pytest
import torch

from eigenpeft import AdapterCollection
from eigenpeft.audit import AuditReport, audit_adapters
from eigenpeft.errors import SubspaceError
from tests.factories import tiny_bert, write_adapter

NAMES = ["bert.encoder.layer.0.attention.self.query", "bert.encoder.layer.1.attention.self.value"]


def task_rows(count=24):
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, 64, (count, 7), generator=generator)
    return [{"input_ids": row.tolist(), "labels": int(row[0]) % 2} for row in ids]


def adapters_of(folder, model, rows, *, along):
    """Five adapters of rank 2 in four leading directions of the task's gradient, or orthogonal to all of it but its tail."""
    batch = {key: torch.tensor([row[key] for row in rows]) for key in ("input_ids", "labels")}
    loss = model.eval()(**batch).loss
    weights = [model.get_submodule(name).weight for name in NAMES]
    sides = [torch.linalg.svd(gradient) for gradient in torch.autograd.grad(loss, weights)]
    chosen = slice(0, 4) if along else slice(-4, None)
    generator = torch.Generator().manual_seed(0)
    for i in range(5):
        factors = {
            name: (
                u[:, chosen] @ torch.randn(4, 2, generator=generator),
                torch.randn(2, 4, generator=generator) @ vh[chosen],
            )
            for name, (u, _, vh) in zip(NAMES, sides, strict=True)
        }
        write_adapter(folder / f"a{i}", factors, task_type="SEQ_CLS")
    return AdapterCollection.from_pretrained(folder)


@pytest.mark.parametrize(
    ("along", "sentence"), [(True, "better than a random one, in every module"), (False, "no better than a random one")]
)
def test_the_gradient_tells_subspaces_apart(tmp_path, along, sentence):
    model, rows = tiny_bert(hidden_dropout_prob=0.0), task_rows()
    collection = adapters_of(tmp_path, model, rows, along=along)
    report = audit_adapters(collection, model=model, rows=rows, n_components=8, progress=False)
    found = report.gradient
    assert len(found.curve) == 4  # all that these adapters have
    assert sentence in report.advice
    assert (found.share > 0.95 * found.optimum) if along else (found.share < 0.1 * min(found.random))
    again = AuditReport.from_dict(json.loads(json.dumps(report.to_dict())))
    assert again.gradient == found


def test_rows_and_their_number_are_as_asked(tmp_path):
    model, rows = tiny_bert(), task_rows(30)
    collection = adapters_of(tmp_path, model, rows, along=True)
    seen = []

    def collate(batch):
        seen.append(len(batch))
        return {key: torch.tensor([row[key] for row in batch]) for key in ("input_ids", "labels")}

    report = audit_adapters(
        collection, model=model, rows=rows, data_collator=collate, n_rows=20, n_nulls=1, progress=False
    )
    assert seen == [8, 8, 4]
    assert report.gradient.n_batches == 3


def test_a_model_without_data_is_one_message(tmp_path):
    collection = adapters_of(tmp_path, tiny_bert(), task_rows(), along=True)
    with pytest.raises(SubspaceError, match="model= without rows="):
        audit_adapters(collection, model=tiny_bert())
    with pytest.raises(SubspaceError, match="rows= without model="):
        audit_adapters(collection, rows=task_rows())
