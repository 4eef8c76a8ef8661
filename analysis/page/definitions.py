"""What the words of a report mean: for each section its terms, each with a sentence."""

Definitions = tuple[tuple[str, str], ...]

SUMMARY: Definitions = (
    ("difference between modules", "Coefficient of variation (cv): standard deviation over the modules of their mean "
                                   "magnitude, relative to its mean; the interval is of a bootstrap over the modules."),
    ("KL", "Mean Kullback-Leibler divergence of the network's answers, with one site quantized, from those in floating "
           "point, in nats; of the typical site: the median. Two runs compare only where their images are alike."),
    ("plan ahead", "Top-1 of the plan minus that of the largest uniform bits within its budget, on the same images, ± "
                   "one standard error of the difference."),
    ("top-1", "Share of the validation images whose first answer is right, ± one standard error over the images."),
    ("loss", "Mean cross-entropy of the validation images in nats, ± one standard error over the images."),
    ("weight bits, activation bits", "Mean over the elements of all tensors that are quantized; 32 in floating point."),
    ("size", "Integer codes, scales and offsets, and 4 bytes for each parameter that stays in floating point; 1 MiB is "
             "1,048,576 bytes."),
    ("GBitOps", "Multiply-accumulates of one image times the bits of both operands, summed over all matrix products, "
                "in units of 10⁹."),
    ("w3a4", "3 bits for weights and 4 for activations. It includes the exception of layout paper: the first "
             "convolution or patch embedding and the classifier have 8 bits (none with layout strict). So uniform w3a4 "
             "costs more than 3 and 4 mean bits, while a plan of 3 and 4 pays for the exception out of its budget."),
    ("without training", "Quantized and calibrated on training images, no weight learned; QAT trains with the "
                         "quantizers in place."),
)  # fmt: skip
VARIATION: Definitions = (
    ("mean magnitude", "Mean absolute value of a module's tensor; its standard deviation over the modules is the SDAM "
                       "of Huang et al. (2024), divided by the mean it is free of scale."),
    ("excess kurtosis", "Heaviness of the tails: 0 for a Gaussian, larger where a few values are far out."),
    ("channel range ratio", "Largest magnitude of the widest channel over that of the median channel."),
    ("difference between modules", "For kurtosis and channel ranges: the interquartile range over the modules."),
    ("difference of cv", "Coefficient of variation (standard deviation over mean) of the modules' mean magnitudes, one "
                         "run's minus the other's, with a bootstrap interval over the modules; the Brown-Forsythe test "
                         "compares the spread of their logarithms. Modules are no independent sample: a description."),
    ("outliers", "Share of values further than 6 standard deviations from the mean."),
    ("heads", "One point a head of an attention layer: the standard deviation of its query, key, value or attention "
              "values; their spread is its coefficient of variation over the heads."),
    ("densities by kind", "Every tensor minus its mean, over its standard deviation; those of one kind of layer are "
                          "pooled, each counting alike. The height is logarithmic: a Gaussian is a dome."),
    ("channels", "Of one layer a run, that of the largest channel range ratio of its input unless another was asked "
                 "for: smallest and largest value of each channel, and mean plus and minus standard deviation."),
)  # fmt: skip
SENSITIVITY: Definitions = (
    ("site", "One tensor that can be quantized. Here one at a time is, while all else stays in floating point."),
    ("KL", "Mean Kullback-Leibler divergence of the network's answers from those in floating point, in nats; the sites "
           "are ranked by it, for it is the least noisy."),
    ("loss increase, top-1 change", "Against the floating-point network on the same images; ± one standard error of "
                                    "the difference. Negative changes are kept."),
    ("SQNR", "Power of a tensor over the power of its quantization error, in decibel: of the quantized tensor itself, "
             "and of its module's output."),
    ("rank in resampled images", "Where a site's rank lies in 95 % of bootstrap samples of the images; sites whose "
                                 "bands overlap cannot be told apart."),
    ("left out", "Everything is quantized but one group, which stays in floating point: a low bar says that it hurts."),
    ("proxy", "A score without a pass for each site. fisher: the KL to second order, from one backward pass; fit, "
              "output_gradient, hessian_trace: published scores; noise: 1/SQNR; stats_...: statistics of the tensor."),
)  # fmt: skip
PLAN: Definitions = (
    ("budget", "What the plan may cost at most; a dash leaves a cost free."),
    ("objective", "The measured change that the integer program minimises, added up over the sites as if they were "
                  "independent."),
    ("lower bound, gap", "No plan within the budget has a smaller objective than the bound; the gap is how far the "
                         "plan can be from it, relative to the objective: 0 is proved optimal."),
    ("sum of measured loss increases", "Of the chosen bits, each measured alone: a prediction, to be compared with the "
                                       "loss in the summary."),
    ("granularity", "Whether all elements of a tensor, each output channel or each attention head share a scale."),
    ("offset", "Whether the range is shifted by an offset beside the scale."),
)  # fmt: skip
TRAINING: Definitions = (
    ("loss, top-1", "Markers: cross-entropy and top-1 of the validation images; step 0 is the calibrated network "
                    "before training. Thin lines: of single batches, their loss being the sum of all terms."),
    ("best top-1", "The highest of the validation points; chosen on the images that it is measured on, it flatters."),
    ("loss terms", "What is added up and minimised, weights and ramps of the configuration included: task is the "
                   "cross-entropy with the labels, kd the divergence from the teacher's answers, obr_distance and "
                   "obr_variance the parts of oscillation-aware bin regularisation (squared distance of weights to "
                   "their grid points, variance of the weights in each bin), dampening and kurtosis others."),
    ("gradient norm", "Length of the gradient of one term over the weights: how hard it pulls, which its value does "
                      "not tell. A sixteenth of the task's is enough for OBR to halve oscillation; a thousandth of "
                      "the strongest hardly moves a weight."),
    ("oscillating", "Share of the weights of at most 4 bits whose integer code reversed its direction at least twice "
                    "in the last oscillation_window steps of the configuration; a dash where the training was "
                    "shorter than that."),
    ("oscillating, EMA", "Share whose moving average of reversals is above a threshold (Nagel et al., 2022); "
                         "comparable only between trainings of the same momentum."),
    ("bin edge", "Where a latent weight's integer code changes, halfway between two neighbouring grid points (the "
                 "centres of the bins). The density of weights over their distance from the nearest edge is 1 where "
                 "they are spread evenly; those that were clipped are left out. A peak at the edge that "
                 "grows from the start to the end is oscillation, weights that leave the edges are what OBR wants; a "
                 "slope that is there at the start is the bell shape of the weights on a grid with one code more "
                 "below 0 than above."),
)  # fmt: skip
STEPS: Definitions = (
    ("status", "How the last start of a step ended."),
    ("git commit", "Of this program's checkout, with -dirty where it had changes; a dash where it was installed."),
)
