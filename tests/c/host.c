/* A program that loads the plug-in named by its argument. With USES_GRADWIRE it is linked with gradwire itself, and the plug-in
 * works with its worker; without, only the plug-in knows gradwire, and is unloaded at the end. */
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>

#ifdef USES_GRADWIRE
#include "expect.h"
#endif

static void *symbol(void *library, const char *name) {
    void *found = library == NULL ? NULL : dlsym(library, name);
    if (found == NULL) {
        fprintf(stderr, "%s\n", dlerror());
        exit(1);
    }
    return found;
}

int main(int argc, char **argv) {
    void *library = dlopen(argc > 1 ? argv[1] : "", RTLD_NOW | RTLD_LOCAL);
#ifdef USES_GRADWIRE
    int (*push)(gw_worker);
    *(void **)&push = symbol(library, "plugin_push");
    const uint64_t shape[] = {3};
    const gw_tensor tensor = {.name = "w", .shape = shape, .dimensions = 1};
    gw_worker worker;
    float w[3];
    EXPECT(gw_connect(&tensor, 1, &worker) == GW_OK);
    EXPECT(push(worker) == 0);
    EXPECT(gw_wait(worker, 60000) == GW_OK);
    EXPECT(gw_parameters(worker, 0, w, 3) == GW_OK);
    EXPECT(w[0] == -1.0f && w[1] == -2.0f && w[2] == -3.0f);
    EXPECT(gw_finish(worker) == GW_OK);
#else
    int (*train)(unsigned);
    *(void **)&train = symbol(library, "plugin_train");
    if (train(5) != 0)
        return 1;
#endif
    if (dlclose(library) != 0)
        return 1;
    puts("plug-in ok");
    return 0;
}
