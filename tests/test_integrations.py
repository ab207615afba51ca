"""integrations: the callbacks end where Train and attach do; loggers write what they were given."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import featherweight as fw
from featherweight.distill import Logits
from featherweight.errors import RecipeError
from featherweight.network.file.digest import digest
from featherweight.prune import Weights
from featherweight.recover.integrations import loggers
from problems import PROBLEMS, task
from test_attach import BESIDE, LR, loader, student, trained
from test_examples import examples, namespace

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.xdist_group("examples")]
torch.set_num_threads(1)


# ---- Lightning
def module_of(net: fw.Network, scheduled: bool = False, as_mapping: bool = False, parameters: bool = True) -> Any:
    lightning = pytest.importorskip("pytorch_lightning")

    class Module(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.network = net

        def configure_optimizers(self) -> Any:
            given = self.parameters() if parameters else self.network.parameters()
            optimizer = torch.optim.SGD(given, lr=LR, momentum=0.9)
            if not scheduled:
                return optimizer
            return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)]

        def training_step(self, batch: Any, index: int) -> Any:
            loss = F.cross_entropy(self.network(batch[0]), batch[1])
            return {"loss": loss} if as_mapping else loss

    return Module()


def fit(module: Any, callback: Any, folder: Path, epochs: int = 2, **more: Any) -> Any:
    lightning = pytest.importorskip("pytorch_lightning")
    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
                               "enable_model_summary": False, "default_root_dir": folder, "accelerator": "cpu"}
    trainer = lightning.Trainer(max_epochs=epochs, callbacks=[callback], **{**options, **more})
    module.network.train()
    return trainer, module


@pytest.mark.parametrize(("name", "scheduled"), [
    ("all", True), *(pytest.param(n, False, marks=pytest.mark.slow) for n in ("all", "penalty on channels"))])
def test_lightning_ends_where_train_does(name: str, scheduled: bool, tmp_path: Path) -> None:
    net = student()
    callback = fw.integrations.lightning.Callback(net, task(PROBLEMS["residual"]), BESIDE[name])
    trainer, module = fit(module_of(net, scheduled, as_mapping=scheduled), callback, tmp_path)
    trainer.fit(module, loader())
    assert digest(callback.finished) == digest(trained(name))
    assert not net._taps
    assert not hasattr(module, "featherweight")
    assert "training_step" not in vars(module)


@pytest.mark.slow
def test_a_lightning_training_that_was_stopped_goes_on(tmp_path: Path) -> None:
    lightning = pytest.importorskip("pytorch_lightning")
    for stopped in (True, False):
        net = student()
        callback = fw.integrations.lightning.Callback(net, task(PROBLEMS["residual"]), BESIDE["all"])
        saving = lightning.callbacks.ModelCheckpoint(tmp_path, filename="last", save_on_train_epoch_end=True)
        trainer, module = fit(module_of(net), callback, tmp_path, enable_checkpointing=True)
        trainer.callbacks.append(saving)
        if stopped:
            trainer.fit_loop.on_advance_end_was = trainer.fit_loop.on_advance_end

            def stop(trainer: Any = trainer) -> None:
                trainer.fit_loop.on_advance_end_was()
                trainer.should_stop = True

            trainer.fit_loop.on_advance_end = stop
        trainer.fit(module, loader(), ckpt_path=None if stopped else str(tmp_path / "last.ckpt"))
    assert digest(callback.finished) == digest(trained("all"))


def test_what_lightning_is_told_wrongly_is_said(tmp_path: Path) -> None:
    callback = fw.integrations.lightning.Callback(student(), task(PROBLEMS["residual"]), (Weights(0.5),))
    trainer, module = fit(module_of(student()), callback, tmp_path)
    with pytest.raises(RecipeError, match=r"no part of the LightningModule.*self\.network = network"):
        trainer.fit(module, loader())
    net = student()
    failing = fw.integrations.lightning.Callback(net, task(PROBLEMS["residual"]), (Logits(),))
    trainer, module = fit(module_of(net), failing, tmp_path)
    module.training_step = lambda batch, index: net.tensor("fc.weight").sum()
    with pytest.raises(RecipeError, match="did not call the network"):
        trainer.fit(module, loader())
    assert not net._taps, "a training that failed leaves nothing behind"


# ---- Hugging Face
def hugging(net: fw.Network, callback: Any, folder: Path, **more: Any) -> Any:
    transformers = pytest.importorskip("transformers")

    class Trainer(transformers.Trainer):  # type: ignore[misc]
        def create_optimizer(self, *args: Any) -> Any:
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=LR, momentum=0.9)
            return self.optimizer

        def get_train_dataloader(self) -> Any:
            return loader(("x", "labels"))

    arguments = transformers.TrainingArguments(
        str(folder), per_device_train_batch_size=8, num_train_epochs=2, max_grad_norm=0.0, use_cpu=True, report_to=[],
        logging_strategy="no", disable_tqdm=True, remove_unused_columns=False, lr_scheduler_type="constant",
        learning_rate=LR, **{"save_strategy": "no", **more})
    return Trainer(callback.model, arguments, callbacks=[callback], compute_loss_func=callback.loss)


@pytest.mark.parametrize("name", ["all", pytest.param("penalty on channels", marks=pytest.mark.slow)])
def test_the_trainer_ends_where_train_does(name: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    net = student()
    callback = fw.integrations.transformers.Callback(net, task(PROBLEMS["residual"]), BESIDE[name])
    hugging(net, callback, tmp_path).train()
    assert callback.attached.done == 6
    assert digest(callback.finished) == digest(trained(name))
    assert not net._taps


@pytest.mark.slow
def test_a_trainer_that_was_stopped_goes_on(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")

    class Stop(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            control.should_training_stop = state.global_step == 4

    for stopped in (True, False):
        net = student()
        callback = fw.integrations.transformers.Callback(net, task(PROBLEMS["residual"]), BESIDE["all"])
        trainer = hugging(net, callback, tmp_path, save_strategy="steps", save_steps=2)
        if stopped:
            trainer.add_callback(Stop())
        trainer.train(resume_from_checkpoint=None if stopped else str(tmp_path / "checkpoint-4"))
    assert digest(callback.finished) == digest(trained("all"))
    (tmp_path / "checkpoint-4" / "featherweight.safetensors").unlink()
    callback = fw.integrations.transformers.Callback(student(), task(PROBLEMS["residual"]), BESIDE["all"])
    with pytest.raises(RecipeError, match="without this callback"):
        hugging(net, callback, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    callback.close()


# ---- Accelerate
@pytest.mark.slow
def test_in_accelerate() -> None:
    accelerate = pytest.importorskip("accelerate")
    net = student()
    optimizer = torch.optim.SGD(net.parameters(), lr=LR, momentum=0.9)
    attached = fw.recover.attach(net, task(PROBLEMS["residual"]), BESIDE["all"], steps=6, optimizer=optimizer)
    accelerator = accelerate.Accelerator(cpu=True)
    prepared, optimizer = accelerator.prepare(net.train(), optimizer)
    for _ in range(2):
        for inputs, target in task(PROBLEMS["residual"]).batches("train"):
            optimizer.zero_grad()
            accelerator.backward(attached.loss(inputs, prepared(inputs), target))
            optimizer.step()
    assert digest(attached.finish()) == digest(trained("all"))


# ---- loggers
class Stand:
    """In the place of MLflow's module or a W&B run."""

    def __init__(self) -> None:
        self.heard: list[tuple[dict[str, float], int]] = []

    def log(self, figures: dict[str, float], step: int) -> None:
        self.heard.append((figures, step))

    log_metrics = log


def test_every_logger_is_given_every_figure(tmp_path: Path) -> None:
    mlflow, wandb = Stand(), Stand()
    tell = loggers.progress(loggers.JsonLines(tmp_path / "log.jsonl"), loggers.MLflow(mlflow), loggers.WandB(wandb))
    tell("step 1: x", 0, 1, {})
    tell("recover.Train", 1, 4, {"loss": 0.5, "distill.Logits": 0.25})
    tell("measured a(b)", 1, 2, {"file_bytes": 10})
    rows = [json.loads(row) for row in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert rows == [{"step": 0, "recover.Train/loss": 0.5, "recover.Train/distill.Logits": 0.25},
                    {"step": 1, "measured a(b)/file_bytes": 10.0}]
    assert [({"step": step} | figures) for figures, step in wandb.heard] == rows
    assert mlflow.heard[1] == ({"measured a_b_/file_bytes": 10.0}, 1)


def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = loggers.TensorBoard(tmp_path)
    for step, value in enumerate((1.0, 0.5, 0.25)):
        logger.log(step, {"loss": value})
    held = EventAccumulator(str(tmp_path))
    held.Reload()
    assert [(e.step, e.value) for e in held.Scalars("loss")] == [(0, 1.0), (1, 0.5), (2, 0.25)]


@pytest.mark.parametrize(("logger", "package"), [
    (loggers.TensorBoard("x"), "tensorboard"), (loggers.MLflow(), "mlflow"), (loggers.WandB(), "wandb")])
def test_a_logger_whose_package_is_missing_says_so(logger: Any, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(RecipeError, match=f"pip install {package}"):
        logger.log(0, {"x": 1.0})


def test_a_job_tells_a_logger(tmp_path: Path) -> None:
    net = student()
    heard = Stand()
    context = fw.steps.Context(progress=loggers.progress(loggers.WandB(heard)))
    fw.recover.Train(epochs=1, lr=LR).fit(net, task(PROBLEMS["residual"]), context)
    assert any("recover.Train/loss" in figures for figures, _ in heard.heard)


# ---- docstrings
PUBLIC = {f"{module}.{name}": module for module in ("lightning", "transformers", "loggers")
          for name in importlib.import_module(f"featherweight.recover.integrations.{module}").__all__}


@pytest.mark.parametrize("name", PUBLIC)
def test_examples_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import doctest

    monkeypatch.chdir(tmp_path)
    module, _, own = name.partition(".")
    found = examples(name, getattr(getattr(fw.integrations, module), own))
    assert found, f"write an example at the end of the docstring of {name}"
    for test in found:
        said: list[str] = []
        test.globs.update(namespace(test))
        assert not doctest.DocTestRunner(verbose=False).run(test, out=said.append).failed, "".join(said)


def test_an_unknown_integration_is_named() -> None:
    with pytest.raises(AttributeError, match="it has lightning, loggers, transformers"):
        _ = fw.integrations.keras


def test_columns_that_the_network_does_not_have_are_named(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    callback = fw.integrations.transformers.Callback(student(), task(PROBLEMS["residual"]), (Weights(0.5),))
    with pytest.raises(RecipeError, match=r"a batch holds pixels.*captured with x"):
        callback.model(pixels=torch.zeros(2, 3))
    callback.close()
