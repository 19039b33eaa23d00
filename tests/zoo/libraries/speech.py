"""Speech and other sound."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from .model import Model


def speechbrain_models() -> Mapping[str, Model]:
    from speechbrain.lobes.models import ECAPA_TDNN, Xvector
    from speechbrain.lobes.models.transformer import TransformerASR
    from speechbrain.nnet import CNN, RNN, attention, quantisers

    return {
        "ECAPA-TDNN": Model(
            lambda: ECAPA_TDNN.ECAPA_TDNN(
                8,
                lin_neurons=16,
                channels=[16, 16, 16],
                kernel_sizes=[5, 3, 1],
                dilations=[1, 2, 1],
                attention_channels=8,
            ),
            lambda m: m(torch.randn(2, 20, 8)),
        ),
        "x-vector": Model(
            lambda: Xvector.Xvector(in_channels=8, tdnn_channels=[16] * 5, lin_neurons=16),
            lambda m: m(torch.randn(2, 40, 8)),
        ),
        "SincConv": Model(
            lambda: CNN.SincConv(out_channels=8, kernel_size=11, in_channels=1), lambda m: m(torch.randn(2, 80))
        ),
        "GaborConv1d": Model(lambda: CNN.GaborConv1d(8, 11, 1, in_channels=1)),
        "LiGRU": Model(lambda: RNN.LiGRU(hidden_size=16, input_shape=[2, 10, 8]), lambda m: m(torch.randn(2, 10, 8))),
        "LSTM": Model(lambda: RNN.LSTM(hidden_size=16, input_shape=[2, 10, 8]), lambda m: m(torch.randn(2, 10, 8))),
        "quasi-RNN": Model(lambda: RNN.QuasiRNN(hidden_size=16, input_shape=[2, 10, 8])),
        "TransformerASR": Model(
            lambda: TransformerASR.TransformerASR(
                64, 8, d_model=32, nhead=2, num_encoder_layers=1, num_decoder_layers=1, d_ffn=32
            )
        ),
        "Conformer": Model(
            lambda: TransformerASR.TransformerASR(
                64,
                8,
                d_model=32,
                nhead=2,
                num_encoder_layers=1,
                num_decoder_layers=0,
                d_ffn=32,
                encoder_module="conformer",
                normalize_before=True,
                attention_type="RelPosMHAXL",
                kernel_size=3,
            )
        ),
        "random projection quantizer": Model(lambda: quantisers.RandomProjectionQuantizer(8, 4, 16)),
        "RelPosMHAXL": Model(lambda: attention.RelPosMHAXL(16, 2)),
    }


def torchaudio_models() -> Mapping[str, Model]:
    from torchaudio import models, transforms

    return {
        "Conformer": Model(
            lambda: models.Conformer(16, 2, 32, 1, 3), lambda m: m(torch.randn(2, 10, 16), torch.tensor([10, 8]))
        ),
        "ConvTasNet": Model(
            lambda: models.ConvTasNet(
                num_sources=2,
                enc_num_feats=16,
                msk_num_feats=8,
                msk_num_hidden_feats=16,
                msk_num_layers=2,
                msk_num_stacks=1,
            ),
            lambda m: m(torch.randn(2, 1, 400)),
        ),
        "DeepSpeech": Model(lambda: models.DeepSpeech(8, 16, 5)),
        "Emformer": Model(lambda: models.Emformer(16, 2, 32, 1, 4)),
        "wav2vec2": Model(
            lambda: models.wav2vec2_model(
                "layer_norm", [(16, 10, 5), (16, 3, 2)], False, 32, 0.1, 8, 2, 1, 2, 0.1, 48, 0.1, 0.1, False, 0.0, 10
            ),
            lambda m: m(torch.randn(2, 1000)),
        ),
        "Tacotron2": Model(
            lambda: models.Tacotron2(
                n_mels=8,
                symbol_embedding_dim=16,
                encoder_embedding_dim=16,
                encoder_n_convolution=1,
                decoder_rnn_dim=16,
                attention_rnn_dim=16,
                attention_hidden_dim=8,
                prenet_dim=8,
                postnet_embedding_dim=8,
                n_symbol=20,
            )
        ),
        "WaveRNN": Model(
            lambda: models.WaveRNN([2, 2], 16, 4, n_res_block=1, n_rnn=16, n_fc=16, n_freq=8, n_hidden=8, n_output=8)
        ),
        "SquimObjective": Model(lambda: models.squim_objective_base()),
        "HDemucs": Model(lambda: models.HDemucs(["a", "b"], channels=8, depth=3, nfft=256)),
        "MelSpectrogram": Model(lambda: transforms.MelSpectrogram(n_fft=64, n_mels=8)),
        "MFCC": Model(lambda: transforms.MFCC(n_mfcc=4, melkwargs={"n_fft": 64, "n_mels": 8})),
        "Resample": Model(lambda: transforms.Resample(16000, 8000), lambda m: m(torch.randn(2, 400))),
    }
