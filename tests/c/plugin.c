/* A shared library that uses gradwire, for a program that may use it too or may not know of it. */
#include "expect.h"

int plugin_push(gw_worker worker);
int plugin_train(unsigned steps);

/* Pushes with the program's own worker; an error in here is told in here and in the program alike, as both are one library. */
int plugin_push(gw_worker worker) {
    const float gradient[3] = {1.0f, 2.0f, 3.0f};
    FAILS(gw_push_pull(worker, 9, gradient, 3), GW_INVALID, "tensor 9");
    EXPECT(gw_push_pull(worker, 0, gradient, 3) == GW_OK);
    return 0;
}

/* Takes the process' place in the job by itself. */
int plugin_train(unsigned steps) {
    const uint64_t shape[] = {3};
    const gw_tensor tensor = {.name = "w", .shape = shape, .dimensions = 1};
    const float gradient[3] = {1.0f, 2.0f, 3.0f};
    gw_worker worker;
    float w[3];
    EXPECT(gw_connect(&tensor, 1, &worker) == GW_OK);
    for (unsigned step = 0; step < steps; step++) {
        EXPECT(gw_push_pull(worker, 0, gradient, 3) == GW_OK);
        EXPECT(gw_wait(worker, 60000) == GW_OK);
    }
    EXPECT(gw_parameters(worker, 0, w, 3) == GW_OK);
    EXPECT(w[0] == -1.0f * (float)steps && w[2] == -3.0f * (float)steps);
    EXPECT(gw_finish(worker) == GW_OK);
    return 0;
}
