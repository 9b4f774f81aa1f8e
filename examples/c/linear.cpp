// The smallest example, in C++: two workers learn a 10 x 10 matrix; the servers run SGD. The same as examples/linear.rs, with
// statuses as exceptions and the worker closed by its owner's destructor.
//
//     c++ -O2 linear.cpp $(pkg-config --cflags --libs gradwire) -o linear
//     gradwire run -s 1 -n 2 --optimizer sgd --lr 0.1 -- ./linear
#include <gradwire.h>

#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

void check(gw_status status) {
    if (status != GW_OK) throw std::runtime_error(gw_last_error());
}

class Worker {
public:
    explicit Worker(const std::vector<gw_tensor> &tensors) { check(gw_connect(tensors.data(), tensors.size(), &worker_)); }
    ~Worker() { gw_close(worker_); }  // answers GW_CLOSED, and does nothing, after finish()
    Worker(const Worker &) = delete;
    Worker &operator=(const Worker &) = delete;

    std::size_t rank() const {
        std::size_t rank;
        check(gw_rank(worker_, &rank));
        return rank;
    }
    std::uint64_t clock() const {
        std::uint64_t clock;
        check(gw_clock(worker_, &clock));
        return clock;
    }
    void parameters(std::size_t tensor, std::vector<float> &out) const {
        check(gw_parameters(worker_, tensor, out.data(), out.size()));
    }
    void push_pull(std::size_t tensor, const std::vector<float> &gradient) {
        check(gw_push_pull(worker_, tensor, gradient.data(), gradient.size()));
    }
    void wait() { check(gw_wait(worker_, 60000)); }
    void finish() { check(gw_finish(worker_)); }

private:
    gw_worker worker_ = 0;
};

constexpr std::size_t n = 10;

void train(std::uint64_t steps) {
    const std::array<std::uint64_t, 2> shape{n, n};
    gw_tensor tensor{};
    tensor.name = "w";
    tensor.shape = shape.data();
    tensor.dimensions = shape.size();
    tensor.init = GW_INIT_NORMAL;
    tensor.init_value = 1.0f;
    Worker worker({tensor});
    std::vector<float> w(n * n), x(n), gradient(n * n);
    float loss = 0.0f;
    for (std::uint64_t step = worker.clock(); step < steps; step++) {
        worker.parameters(0, w);
        // y = x a, where a is the matrix to be found; each worker has its own inputs.
        for (std::size_t i = 0; i < n; i++) x[i] = std::sin(static_cast<float>(step * 7 + i * 3 + worker.rank() * 5));
        loss = 0.0f;
        for (std::size_t column = 0; column < n; column++) {
            float error = 0.0f;
            for (std::size_t row = 0; row < n; row++)
                error += x[row] * (w[row * n + column] - static_cast<float>(row + column) * 0.1f);
            loss += error * error / static_cast<float>(n);
            for (std::size_t row = 0; row < n; row++)
                gradient[row * n + column] = 2.0f * error * x[row] / static_cast<float>(n);
        }
        worker.push_pull(0, gradient);
        worker.wait();
        if (step % 200 == 0) std::printf("step %llu: loss %.6f\n", static_cast<unsigned long long>(step), loss);
    }
    std::printf("the loss went to %.9f\n", loss);
    worker.finish();
}

}  // namespace

int main(int argc, char **argv) {
    try {
        train(argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 1000);
        return 0;
    } catch (const std::exception &error) {
        std::fprintf(stderr, "%s\n", error.what());
        return 1;
    }
}
