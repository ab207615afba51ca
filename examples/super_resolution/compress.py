"""Super-resolution with a score of one's own, PSNR.   python compress.py"""

import model

import featherweight as fw

task = model.task()
network = fw.capture(model.trained(), next(task.batches("train"))[0][:2])
result = fw.compress(network, task, [
    fw.prune.Channels(macs=0.5, round_to=8, compensate="least_squares"),
    fw.recover.Train(epochs=model.EPOCHS, lr=1e-3, optimizer="adamw", distill=fw.distill.Regression()),
    fw.quantize.Quantize(),
], out="out")
print(result.trail[0].score, "->", result.trail[-1].score, "dB; out/report.html")
