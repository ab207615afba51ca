"""QAT and gradual pruning beside a loop of one's own, for a Conv1d and a GRU.   python compress.py"""

import model

import featherweight as fw

task, spotter = model.task(), model.trained()
whole = fw.capture(spotter, next(task.batches("train"))[0][:2], dynamic={})    # always a second of sound
network = whole.copy().train()
optimizer = model.optimizer(network)
beside = (fw.prune.Weights(sparsity=0.8), fw.quantize.Quantize(), fw.distill.Logits())
attached = fw.recover.attach(network, task, beside, steps=model.EPOCHS * model.BATCHES, optimizer=optimizer)
for _ in range(model.EPOCHS):
    for sounds, words in task.batches("train"):
        optimizer.zero_grad()
        attached.loss(sounds, network(sounds), words).backward()
        optimizer.step()
before, after = (fw.measure.measure(n, task, split="test", archive=True) for n in (whole, attached.finish()))
print(f"{before.score:.1f} -> {after.score:.1f} %, archive {before.archive_bytes} -> {after.archive_bytes} bytes")
