// What the self-test and the kernels need of the C library and OpenMP, for a machine without an operating system.
//   clflush of a text prints it, and hlt ends the program with the status in eax: run_bochs.py watches for both.
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

using Constructor = void (*)();
extern Constructor __init_array_start[], __init_array_end[];
int main(int argc, char **argv);

extern "C" {

void *__dso_handle = nullptr;

// run_bochs.py sets up the stack, the thread-local storage and the arguments.
[[noreturn]] void start(int argc, char **argv) {
    for (Constructor *constructor = __init_array_start; constructor != __init_array_end; ++constructor)
        (*constructor)();
    const int status = main(argc, argv);
    for (;;) asm volatile("hlt" : : "a"(status));
}
asm(".globl _start\n_start: call start\n");

void *memcpy(void *to, const void *from, size_t size) {
    auto *t = static_cast<char *>(to);
    auto *f = static_cast<const char *>(from);
    for (; size >= 8; size -= 8, t += 8, f += 8) __builtin_memcpy(t, f, 8);
    for (; size; --size) *t++ = *f++;
    return to;
}
void *memset(void *to, int value, size_t size) {
    auto *t = static_cast<char *>(to);
    const uint64_t eight = static_cast<unsigned char>(value) * 0x0101010101010101u;
    for (; size >= 8; size -= 8, t += 8) __builtin_memcpy(t, &eight, 8);
    for (; size; --size) *t++ = static_cast<char>(value);
    return to;
}
int memcmp(const void *a, const void *b, size_t size) {
    auto *p = static_cast<const unsigned char *>(a);
    auto *q = static_cast<const unsigned char *>(b);
    for (; size >= 8; size -= 8, p += 8, q += 8) {
        uint64_t x, y;
        __builtin_memcpy(&x, p, 8);
        __builtin_memcpy(&y, q, 8);
        if (x != y) break;
    }
    for (; size; --size, ++p, ++q) {
        if (*p != *q) return *p < *q ? -1 : 1;
    }
    return 0;
}
int strcmp(const char *a, const char *b) {
    for (; *a && *a == *b; ++a, ++b) {
    }
    return static_cast<unsigned char>(*a) - static_cast<unsigned char>(*b);
}

// Knows %s, %d, %lld, %0<width>x and %%.
int vsnprintf(char *to, size_t size, const char *format, va_list arguments) {
    size_t used = 0;
    const auto put = [&](char c) {
        if (used + 1 < size) to[used] = c;
        ++used;
    };
    for (; *format; ++format) {
        if (*format != '%') {
            put(*format);
            continue;
        }
        int width = 0, longs = 0;
        for (++format; *format >= '0' && *format <= '9'; ++format) width = width * 10 + (*format - '0');
        for (; *format == 'l'; ++format) ++longs;
        if (*format == 's') {
            for (const char *text = va_arg(arguments, const char *); *text; ++text) put(*text);
        } else if (*format == 'd' || *format == 'x') {
            const unsigned base = *format == 'd' ? 10 : 16;
            const long long value = longs ? va_arg(arguments, long long) : va_arg(arguments, int);
            unsigned long long rest =
                base == 16 ? static_cast<unsigned>(value) : static_cast<unsigned long long>(value);
            if (base == 10 && value < 0) {
                put('-');
                rest = -rest;
            }
            char digits[24];
            int count = 0;
            do digits[count++] = "0123456789abcdef"[rest % base];
            while (rest /= base);
            for (int i = count; i < width; ++i) put('0');
            while (count) put(digits[--count]);
        } else {
            put(*format);
        }
    }
    if (size) to[used < size ? used : size - 1] = 0;
    return static_cast<int>(used);
}
int snprintf(char *to, size_t size, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    const int used = vsnprintf(to, size, format, arguments);
    va_end(arguments);
    return used;
}
int printf(const char *format, ...) {
    static char text[1024];
    va_list arguments;
    va_start(arguments, format);
    const int used = vsnprintf(text, sizeof(text), format, arguments);
    va_end(arguments);
    asm volatile("clflush %0" : : "m"(text) : "memory");
    return used;
}
int puts(const char *text) { return printf("%s\n", text); }

// Of a normal float64 or zero, which is all that float32 becomes.
double frexp(double value, int *exponent) {
    uint64_t bits;
    __builtin_memcpy(&bits, &value, 8);
    *exponent = value == 0.0 ? 0 : static_cast<int>(bits >> 52 & 2047) - 1022;
    if (value == 0.0) return value;
    bits = (bits & ~(uint64_t{2047} << 52)) | uint64_t{1022} << 52;
    __builtin_memcpy(&value, &bits, 8);
    return value;
}
double ldexp(double value, int exponent) {
    const uint64_t bits = static_cast<uint64_t>(exponent + 1023) << 52;
    double factor;
    __builtin_memcpy(&factor, &bits, 8);
    return value * factor;
}

// One thread, which is all that a caller of parallel regions may count on.
int omp_get_thread_num() { return 0; }
int omp_get_num_threads() { return 1; }
void GOMP_parallel(void (*region)(void *), void *data, unsigned, unsigned) { region(data); }
void GOMP_barrier() {}
// Takes all access away, in the page tables that run_bochs.py has made: an entry of 8 bytes a page, in order.
int mprotect(void *start, size_t size, int) {
    auto *entries = reinterpret_cast<volatile uint64_t *>(0x100000);
    for (uintptr_t at = reinterpret_cast<uintptr_t>(start), end = at + size; at < end; at += 4096) {
        entries[at / 4096] = 0;
        asm volatile("invlpg (%0)" : : "r"(at) : "memory");
    }
    return 0;
}
int pthread_atfork(void (*)(), void (*)(), void (*)()) { return 0; }
int __register_atfork(void (*)(), void (*)(), void (*)(), void *) { return 0; }
void abort() { __builtin_trap(); }
}
