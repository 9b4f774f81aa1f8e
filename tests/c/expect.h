/* What the test programs check with. */
#ifndef EXPECT_H
#define EXPECT_H

#include <gradwire.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define EXPECT(condition)                                                                                    \
    do {                                                                                                     \
        if (!(condition)) {                                                                                  \
            fprintf(stderr, "%s:%d: not so: %s (%s)\n", __FILE__, __LINE__, #condition, gw_last_error());    \
            exit(1);                                                                                         \
        }                                                                                                    \
    } while (0)

/* A call fails with this status, and its text says this. */
#define FAILS(call, status, part)                                                                            \
    do {                                                                                                     \
        EXPECT((call) == (status));                                                                          \
        EXPECT(strstr(gw_last_error(), part) != NULL);                                                       \
    } while (0)

#endif
