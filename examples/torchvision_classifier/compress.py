"""A torchvision classifier on a folder of images.   python compress.py"""

import model

import featherweight as fw

resnet = model.trained()
task = fw.task.images("images", size=64, resize=64)
network = fw.capture(resnet, next(task.batches("calibration"))[0][:2])
result = fw.compress(network, task, [
    fw.prune.Channels(macs=0.5, round_to=8, allocation="sensitivity", compensate="least_squares"),
    fw.recover.Train(epochs=2, lr=1e-3, optimizer="adamw", distill=fw.distill.Logits()),
    fw.quantize.Quantize(),
], out="out")
print(result.trail[0].score, "->", result.trail[-1].score, "; out/report.html")
