"""A detector in parts: its network is compressed, the Python that makes boxes stays.   python compress.py"""

import model

import featherweight as fw

task, detector = model.task(), model.trained()
assembly = fw.capture(detector, next(task.batches("calibration"))[0][:2], parts=True)
result = fw.compress(assembly.parts["maps"], task, [
    fw.prune.Channels(macs=0.5, round_to=8),
    fw.recover.Train(epochs=model.EPOCHS // 2, lr=0.05, schedule="onecycle", clip=5.0, autocast="bf16",
                     channels_last=True),
    fw.quantize.Quantize(),
], out="out")
assembly.replace("maps", result.network)                      # assembly(images) gives boxes as before
assembly.save("detector.fw")
print(result.trail[0].score, "->", result.trail[-1].score, "; out/report.html")
