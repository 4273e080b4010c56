// What is right, for the kernel studies: functions of loopmdm.c under names to link to.
#define main loopmdm_main
#include "../tools.c"
#undef main

void cpu_matmul_forward(float *out, const float *inp, const float *weight, const float *bias, int M,
                        int C, int OC) {
    matmul_forward(out, inp, weight, M, C, OC, (Epilogue){bias, NULL, NULL, NULL, NULL});
}

void cpu_attention_forward(float *out, float *lse, const float *qkv, int B, int T, int C, int NH) {
    attention_forward(out, lse, qkv, B, T, C, NH);
}

void cpu_attention_backward(float *dqkv, const float *dout, const float *qkv, const float *lse,
                            int B, int T, int C, int NH) {
    attention_backward(dqkv, dout, qkv, lse, B, T, C, NH);
}

// logits (R,V) become their gradient, in place.
void cpu_crossentropy(float *losses, float *logits, const float *weights, const int *targets,
                      const int *positions, int R, int V) {
    crossentropy(losses, logits, weights, targets, positions, R, V);
}
