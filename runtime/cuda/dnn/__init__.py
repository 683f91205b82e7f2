"""cuDNN by graphs (the package nvidia-cudnn-frontend), for what it does best: convolution and attention."""

from meshtape.runtime.cuda.dnn.graphs import Dnn as Dnn
