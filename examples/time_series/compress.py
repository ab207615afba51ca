"""A forecast: low rank within a budget, then 8 bits.   python compress.py"""

import model

import featherweight as fw

task = model.task()
network = fw.capture(model.trained(), next(task.batches("train"))[0][:2])
result = fw.compress(network, task, [
    fw.factorize.LowRank(params=0.6, form="auto", data=True),
    fw.recover.Train(epochs=model.EPOCHS, lr=1e-3, optimizer="adamw", distill=fw.distill.Regression()),
    fw.quantize.Quantize(),
], out="out")
print(result.trail[0].score, "->", result.trail[-1].score, "; out/report.html")
