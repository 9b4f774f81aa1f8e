/* Steps until the job fails, and says how. Its signals are as a C program has them: a broken connection must not end it. */
#include "expect.h"

#include <signal.h>

int main(void) {
    const uint64_t shape[] = {100000};
    const gw_tensor tensor = {.name = "w", .shape = shape, .dimensions = 1};
    static float gradient[100000];
    gw_worker worker;
    gw_status status = GW_OK;
    signal(SIGTERM, SIG_IGN); /* the launcher's, which would end it before it has told */
    EXPECT(gw_connect(&tensor, 1, &worker) == GW_OK);
    puts("stepping");
    fflush(stdout);
    while (status == GW_OK) {
        status = gw_push_pull(worker, 0, gradient, 100000);
        if (status == GW_OK)
            status = gw_wait(worker, 60000);
    }
    printf("status %d: %s\n", (int)status, gw_last_error());
    fflush(stdout);
    EXPECT(status == GW_FAILED);
    EXPECT(gw_wait(worker, 1000) == GW_FAILED);
    EXPECT(gw_close(worker) == GW_OK);
    puts("closed");
    return 0;
}
