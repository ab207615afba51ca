"""A U-Net: channels cut and refit, then 8 bits, no training.   python compress.py"""

import model

import featherweight as fw

task = model.task()
network = fw.capture(model.trained(), next(task.batches("train"))[0][:2])
result = fw.compress(network, task, [
    fw.prune.Channels(macs=0.5, score="reconstruction", allocation="sensitivity",
                      compensate="least_squares", round_to=4),
    fw.quantize.Quantize(),
], out="out")
print(result.trail[0].score, "->", result.trail[-1].score, "; out/report.html")
