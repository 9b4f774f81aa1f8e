/* Every function of gradwire.h, used rightly and wrongly: whatever is wrong gives a status and a text, and nothing else happens.
 * The job has this one worker, one server, plain SGD with learning rate 1. */
#define _DEFAULT_SOURCE
#include "expect.h"

#include <math.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <sys/wait.h>
#include <unistd.h>

enum { FLOATS, BRAINS, HALVES, TENSORS };

static const uint64_t SHAPE[] = {2, 2};
static const float QUARTERS[4] = {0.25f, 0.5f, -0.75f, 1.0f};
static const uint16_t BF16_QUARTERS[4] = {0x3e80, 0x3f00, 0xbf40, 0x3f80};
static const uint16_t F16_QUARTERS[4] = {0x3400, 0x3800, 0xba00, 0x3c00};

static gw_tensor tensor(const char *name, uint32_t dtype) {
    return (gw_tensor){.name = name, .shape = SHAPE, .dimensions = 2, .dtype = dtype};
}

static void process_wide(void) {
    EXPECT(strlen(gw_version()) >= 5);
    EXPECT(strcmp(gw_last_error(), "") == 0);
    EXPECT(gw_set_log_level("error") == GW_OK);
    EXPECT(gw_set_log_level("warn") == GW_OK);
    FAILS(gw_set_log_level(NULL), GW_INVALID, "gw_set_log_level: the level is a null pointer");
    FAILS(gw_set_log_level("loud"), GW_INVALID, "`loud`");
}

/* What gw_connect refuses before it looks for a job, and that it finds none. */
static void refused(void) {
    gw_tensor wrong = tensor("w", GW_F32);
    gw_worker worker = 7;
    FAILS(gw_connect(&wrong, 1, NULL), GW_INVALID, "worker is a null pointer");
    FAILS(gw_connect(NULL, 1, &worker), GW_INVALID, "tensors is a null pointer");
    FAILS(gw_connect_on_gpu(NULL, 1, 0, &worker), GW_INVALID, "gw_connect_on_gpu: tensors is a null pointer");
    FAILS(gw_connect_on_gpu(NULL, 0, 4000000000, &worker), GW_INVALID, "gw_connect_on_gpu: ");
    wrong.name = NULL;
    FAILS(gw_connect(&wrong, 1, &worker), GW_INVALID, "the name of tensor 0 is a null pointer");
    wrong.name = "\xff";
    FAILS(gw_connect(&wrong, 1, &worker), GW_INVALID, "not UTF-8");
    wrong = tensor("w", 3);
    FAILS(gw_connect(&wrong, 1, &worker), GW_INVALID, "the dtype of `w` is 3");
    wrong = tensor("w", GW_F32);
    wrong.init = 5;
    FAILS(gw_connect(&wrong, 1, &worker), GW_INVALID, "the init of `w` is 5");
    wrong.init = GW_INIT_NORMAL;
    wrong.init_value = -1.0f;
    FAILS(gw_connect(&wrong, 1, &worker), GW_INVALID, "standard deviation is -1");
    wrong.init = GW_INIT_XAVIER_UNIFORM;
    wrong.dimensions = 1;
    FAILS(gw_connect(&wrong, 1, &worker), GW_INVALID, "fan_in");
    wrong = tensor("w", GW_F32);
    wrong.shape = NULL;
    FAILS(gw_connect(&wrong, 1, &worker), GW_INVALID, "the shape of `w` is a null pointer");
    const char *known = getenv("GRADWIRE_RENDEZVOUS");
    EXPECT(known != NULL);
    char *rendezvous = strdup(known);
    unsetenv("GRADWIRE_RENDEZVOUS");
    wrong = tensor("w", GW_F32);
    FAILS(gw_connect(&wrong, 1, &worker), GW_INVALID, "GRADWIRE_RENDEZVOUS is not set");
    setenv("GRADWIRE_RENDEZVOUS", rendezvous, 1);
    free(rendezvous);
    EXPECT(worker == 7);
}

static void arguments(gw_worker worker) {
    float out[4];
    size_t number;
    FAILS(gw_rank(worker, NULL), GW_INVALID, "null pointer");
    FAILS(gw_tensor_index(worker, "nobody", &number), GW_INVALID, "`nobody`");
    FAILS(gw_tensor_index(worker, NULL, &number), GW_INVALID, "the name is a null pointer");
    EXPECT(gw_tensor_index(worker, "halves", &number) == GW_OK && number == HALVES);
    EXPECT(gw_rank(worker, &number) == GW_OK && number == 0);
    float scale = 0;
    FAILS(gw_loss_scale(worker, NULL), GW_INVALID, "null pointer");
    EXPECT(gw_loss_scale(worker, &scale) == GW_OK && scale == 1.0f);
    EXPECT(gw_workers(worker, &number) == GW_OK && number == 1);
    FAILS(gw_push_pull(worker, FLOATS, NULL, 4), GW_INVALID, "the gradient is a null pointer");
    FAILS(gw_push_pull(worker, TENSORS, QUARTERS, 4), GW_INVALID, "there is no tensor 3");
    FAILS(gw_push_pull(worker, FLOATS, QUARTERS, 3), GW_INVALID, "has 4 elements, and 3 were given");
    FAILS(gw_push(worker, BRAINS, QUARTERS, (size_t)-1), GW_INVALID, "has 4 elements");
    FAILS(gw_push(worker, FLOATS, (const char *)QUARTERS + 1, 4), GW_INVALID, "multiple of 4");
    FAILS(gw_parameters(worker, FLOATS, NULL, 4), GW_INVALID, "out is a null pointer");
    FAILS(gw_parameters(worker, FLOATS, out, 5), GW_INVALID, "has 4 elements");
    FAILS(gw_parameters(worker, 99, out, 4), GW_INVALID, "there is no tensor 99");
    FAILS(gw_test(worker, NULL), GW_INVALID, "done is a null pointer");
    FAILS(gw_completion_fd(worker, NULL), GW_INVALID, "fd is a null pointer");
    FAILS(gw_set_learning_rate(worker, -1.0), GW_INVALID, "-1");
    FAILS(gw_set_learning_rate(worker, (double)NAN), GW_INVALID, "NaN");
    FAILS(gw_rank(0, &number), GW_INVALID, "gw_connect");
    FAILS(gw_rank(worker + 1, &number), GW_CLOSED, "closed");
    FAILS(gw_rank(12345, &number), GW_FORKED, "process 0");
}

/* Parameters after the first step from 0 with rate 1: minus the gradient, in every format. */
static void step(gw_worker worker) {
    float floats[4];
    uint16_t brains[4], halves[4];
    uint64_t number;
    EXPECT(gw_clock(worker, &number) == GW_OK && number == 0);
    int32_t leaves = -1;
    EXPECT(gw_should_leave(worker, &leaves) == GW_OK && leaves == 0);
    EXPECT(gw_push_pull(worker, HALVES, F16_QUARTERS, 4) == GW_OK);
    EXPECT(gw_push_pull(worker, FLOATS, QUARTERS, 4) == GW_OK);
    FAILS(gw_push_pull(worker, FLOATS, QUARTERS, 4), GW_INVALID, "pushed twice");
    FAILS(gw_push(worker, BRAINS, BF16_QUARTERS, 4), GW_INVALID, "mixed");
    FAILS(gw_pull(worker, 0, 1000), GW_INVALID, "on their way");
    EXPECT(gw_push_pull(worker, BRAINS, BF16_QUARTERS, 4) == GW_OK);
    FAILS(gw_parameters(worker, FLOATS, floats, 4), GW_INVALID, "on their way");
    EXPECT(gw_wait(worker, 60000) == GW_OK);
    EXPECT(gw_clock(worker, &number) == GW_OK && number == 1);
    EXPECT(gw_parameter_version(worker, &number) == GW_OK && number == 1);
    EXPECT(gw_parameters(worker, FLOATS, floats, 4) == GW_OK);
    EXPECT(gw_parameters(worker, BRAINS, brains, 4) == GW_OK);
    EXPECT(gw_parameters(worker, HALVES, halves, 4) == GW_OK);
    for (int i = 0; i < 4; i++) {
        EXPECT(floats[i] == -QUARTERS[i]);
        EXPECT(brains[i] == (BF16_QUARTERS[i] ^ 0x8000) && halves[i] == (F16_QUARTERS[i] ^ 0x8000));
    }
}

/* The next clock at half the rate, its end waited for in poll; tensors that are not pushed stay. */
static void polled(gw_worker worker) {
    float floats[4];
    bool done = false;
    struct pollfd ready = {.events = POLLIN};
    EXPECT(gw_set_learning_rate(worker, 0.5) == GW_OK);
    EXPECT(gw_completion_fd(worker, &ready.fd) == GW_OK);
    EXPECT(gw_push_pull(worker, FLOATS, QUARTERS, 4) == GW_OK);
    for (;;) {
        EXPECT(gw_test(worker, &done) == GW_OK);
        if (done)
            break;
        FAILS(gw_push_pull(worker, BRAINS, BF16_QUARTERS, 4), GW_INVALID, "the clock is over");
        EXPECT(poll(&ready, 1, 60000) == 1);
    }
    EXPECT(gw_parameters(worker, FLOATS, floats, 4) == GW_OK);
    EXPECT(floats[0] == -1.5f * QUARTERS[0] && floats[3] == -1.5f * QUARTERS[3]);
    /* Push, then pull. */
    EXPECT(gw_push(worker, FLOATS, QUARTERS, 4) == GW_OK);
    EXPECT(gw_wait(worker, 60000) == GW_OK);
    EXPECT(gw_pull(worker, 3, 60000) == GW_OK);
    EXPECT(gw_parameters(worker, FLOATS, floats, 4) == GW_OK);
    EXPECT(floats[1] == -2.0f * QUARTERS[1]);
    FAILS(gw_pull(worker, 1000, 50), GW_TIMEOUT, "server 0");
}

/* Another rate at a clock that the servers agree on, a checkpoint that is complete some steps later, and how the job stands. */
static void asked(gw_worker worker) {
    uint64_t now, from = 0, written = 0;
    size_t length = 0;
    bool done = false;
    char few[8], text[4096];
    FAILS(gw_set(worker, "speed=1", &from), GW_INVALID, "speed");
    FAILS(gw_set(worker, NULL, &from), GW_INVALID, "settings is a null pointer");
    FAILS(gw_checkpoint_test(worker, &done, &written), GW_INVALID, "no checkpoint has been asked for");
    EXPECT(gw_clock(worker, &now) == GW_OK);
    EXPECT(gw_set(worker, "lr=0.25", &from) == GW_OK && from >= now);
    EXPECT(gw_set(worker, "lr=0.125", NULL) == GW_OK);
    EXPECT(gw_checkpoint(worker) == GW_OK);
    FAILS(gw_checkpoint(worker), GW_INVALID, "already");
    while (!done) {
        EXPECT(gw_push_pull(worker, FLOATS, QUARTERS, 4) == GW_OK);
        EXPECT(gw_wait(worker, 60000) == GW_OK);
        EXPECT(gw_checkpoint_test(worker, &done, &written) == GW_OK);
        usleep(1000);
    }
    EXPECT(written >= now);
    FAILS(gw_job_status(worker, few, sizeof few, &length), GW_INVALID, "there is room for 8");
    EXPECT(length > sizeof few && length < sizeof text);
    FAILS(gw_job_status(worker, NULL, sizeof text, &length), GW_INVALID, "out is a null pointer");
    EXPECT(gw_job_status(worker, text, sizeof text, &length) == GW_OK && strlen(text) + 1 == length);
    EXPECT(strstr(text, "\"ranks\"") != NULL && strstr(text, "running") != NULL);
}

/* Written and read where it lies, and where the caller keeps it. The rate is 1/8 by now. */
static void in_place(gw_worker worker) {
    float before[4], after[4], kept[4] = {0}, gradient[4] = {8, 16, 24, 32};
    gw_view slot, parameters;
    FAILS(gw_gradient_view(worker, FLOATS, NULL), GW_INVALID, "view is a null pointer");
    FAILS(gw_gradient_view(worker, TENSORS, &slot), GW_INVALID, "");
    EXPECT(gw_gradient_view(worker, FLOATS, &slot) == GW_OK && slot.elements == 4 && slot.dtype == GW_F32);
    EXPECT(gw_parameter_view(worker, FLOATS, &parameters) == GW_OK && parameters.elements == 4);
    EXPECT((uintptr_t)slot.data % 4 == 0 && slot.device == -1 && parameters.device == -1);
    EXPECT(gw_parameters(worker, FLOATS, before, 4) == GW_OK);
    memcpy(slot.data, gradient, sizeof gradient);
    EXPECT(gw_push_pull_in_place(worker, FLOATS) == GW_OK);
    EXPECT(gw_wait(worker, 60000) == GW_OK);
    memcpy(after, parameters.data, sizeof after);
    for (int i = 0; i < 4; i++)
        EXPECT(after[i] == before[i] - (float)(i + 1));
    FAILS(gw_push_pull_registered(worker, FLOATS), GW_INVALID, "nothing is registered of tensor 0");
    FAILS(gw_register(worker, FLOATS, gradient, kept, 3), GW_INVALID, "has 4 elements, and 3 were given");
    FAILS(gw_register(worker, FLOATS, (char *)gradient + 1, kept, 4), GW_INVALID, "no multiple of 4");
    EXPECT(gw_register(worker, FLOATS, gradient, kept, 4) == GW_OK);
    gradient[0] = 80;
    EXPECT(gw_push_pull_registered(worker, FLOATS) == GW_OK);
    EXPECT(gw_wait(worker, 60000) == GW_OK);
    EXPECT(gw_parameters_registered(worker) == GW_OK);
    EXPECT(kept[0] == after[0] - 10.0f && kept[3] == after[3] - 4.0f);
    EXPECT(gw_push_in_place(worker, FLOATS) == GW_OK && gw_wait(worker, 60000) == GW_OK);
}

static atomic_bool waiting;

/* Waits in vain for a version, and so keeps the worker busy. */
static void *keep_busy(void *argument) {
    gw_worker worker = *(gw_worker *)argument;
    EXPECT(strcmp(gw_last_error(), "") == 0); /* texts are a thread's own */
    waiting = true;
    FAILS(gw_pull(worker, 1000000000, 1500), GW_TIMEOUT, "version");
    waiting = false;
    return NULL;
}

/* Calls of a second thread, and of a child forked meanwhile, which must not hang on a lock that it inherited. */
static void beside(gw_worker worker) {
    pthread_t thread;
    size_t number;
    gw_status status = GW_OK;
    EXPECT(pthread_create(&thread, NULL, keep_busy, &worker) == 0);
    while (!waiting)
        usleep(1000);
    while (waiting && status == GW_OK)
        status = gw_rank(worker, &number);
    EXPECT(status == GW_BUSY);
    FAILS(gw_close(worker), GW_BUSY, "another thread");
    pid_t child = fork();
    if (child == 0) {
        alarm(30);
        FAILS(gw_rank(worker, &number), GW_FORKED, "a forked child cannot use it");
        FAILS(gw_push_pull(worker, FLOATS, QUARTERS, 4), GW_FORKED, "");
        FAILS(gw_wait(worker, 1000), GW_FORKED, "");
        FAILS(gw_finish(worker), GW_FORKED, "");
        FAILS(gw_close(worker), GW_FORKED, "");
        _exit(0);
    }
    int end = -1;
    EXPECT(child > 0 && waitpid(child, &end, 0) == child && WIFEXITED(end) && WEXITSTATUS(end) == 0);
    EXPECT(pthread_join(thread, NULL) == 0);
}

static void closed(gw_worker worker) {
    float out[4];
    size_t number;
    uint64_t clock;
    bool done;
    int fd;
    FAILS(gw_rank(worker, &number), GW_CLOSED, "gw_rank: the worker has been closed");
    EXPECT(gw_workers(worker, &number) == GW_CLOSED && gw_clock(worker, &clock) == GW_CLOSED);
    EXPECT(gw_parameter_version(worker, &clock) == GW_CLOSED && gw_tensor_index(worker, "w", &number) == GW_CLOSED);
    EXPECT(gw_push(worker, 0, QUARTERS, 4) == GW_CLOSED && gw_push_pull(worker, 0, QUARTERS, 4) == GW_CLOSED);
    EXPECT(gw_pull(worker, 0, 0) == GW_CLOSED && gw_wait(worker, 0) == GW_CLOSED);
    EXPECT(gw_test(worker, &done) == GW_CLOSED && gw_completion_fd(worker, &fd) == GW_CLOSED);
    EXPECT(gw_parameters(worker, 0, out, 4) == GW_CLOSED && gw_set_learning_rate(worker, 1.0) == GW_CLOSED);
    EXPECT(gw_set(worker, "lr=1", &clock) == GW_CLOSED && gw_checkpoint(worker) == GW_CLOSED);
    EXPECT(gw_push_pull_in_place(worker, 0) == GW_CLOSED && gw_register(worker, 0, out, out, 4) == GW_CLOSED);
    EXPECT(gw_finish(worker) == GW_CLOSED && gw_close(worker) == GW_CLOSED);
}

int main(void) {
    const gw_tensor tensors[] = {tensor("floats", GW_F32), tensor("brains", GW_BF16), tensor("halves", GW_F16)};
    gw_worker worker;
    process_wide();
    refused();
    EXPECT(gw_connect(tensors, TENSORS, &worker) == GW_OK);
    arguments(worker);
    step(worker);
    polled(worker);
    asked(worker);
    in_place(worker);
    beside(worker);
    EXPECT(gw_finish(worker) == GW_OK);
    closed(worker);
    puts("surface ok");
    return 0;
}
