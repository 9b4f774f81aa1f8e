/* The smallest example, in C: two workers learn a 10 x 10 matrix; the servers run SGD. The same as examples/linear.rs.
 *
 *     cc -O2 linear.c $(pkg-config --cflags --libs gradwire) -lm -o linear
 *     gradwire run -s 1 -n 2 --optimizer sgd --lr 0.1 -- ./linear
 */
#include <gradwire.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#define N 10

/* Ends the program with what the library says; 75 tells the launcher that it was stopped on request. */
static void check(gw_status status) {
    if (status != GW_OK) {
        fprintf(stderr, "%s\n", gw_last_error());
        exit(status == GW_PREEMPTED ? 75 : 1);
    }
}

int main(int argc, char **argv) {
    const uint64_t steps = argc > 1 ? strtoull(argv[1], NULL, 10) : 1000;
    const uint64_t shape[] = {N, N};
    const gw_tensor tensor = {
        .name = "w", .shape = shape, .dimensions = 2, .dtype = GW_F32, .init = GW_INIT_NORMAL, .init_value = 1.0f};
    gw_worker worker;
    uint64_t step;
    size_t rank;
    check(gw_connect(&tensor, 1, &worker));
    check(gw_rank(worker, &rank));
    check(gw_clock(worker, &step));
    float w[N * N], x[N], gradient[N * N], loss = 0.0f;
    for (; step < steps; step++) {
        check(gw_parameters(worker, 0, w, N * N));
        /* y = x a, where a is the matrix to be found; each worker has its own inputs. */
        for (size_t i = 0; i < N; i++)
            x[i] = sinf((float)(step * 7 + i * 3 + rank * 5));
        loss = 0.0f;
        for (size_t column = 0; column < N; column++) {
            float error = 0.0f;
            for (size_t row = 0; row < N; row++)
                error += x[row] * (w[row * N + column] - (float)(row + column) * 0.1f);
            loss += error * error / (float)N;
            for (size_t row = 0; row < N; row++)
                gradient[row * N + column] = 2.0f * error * x[row] / (float)N;
        }
        check(gw_push_pull(worker, 0, gradient, N * N));
        check(gw_wait(worker, 60000));
        if (step % 200 == 0)
            printf("step %llu: loss %.6f\n", (unsigned long long)step, loss);
    }
    printf("the loss went to %.9f\n", loss);
    check(gw_finish(worker));
    return 0;
}
