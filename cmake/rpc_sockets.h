// Included by force before transport.cpp of llama.cpp, whose connections wait for ever for a machine that has
// vanished or a server that hangs, take any signal for the end of the connection, stay open when they could not be
// made, and die of SIGPIPE when the other side has gone.
#pragma once

#ifndef _WIN32

#include "rpc_waiting.h"

#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <chrono>

#ifdef MSG_NOSIGNAL
#define OVERSPILL_NO_SIGNAL MSG_NOSIGNAL
#else
#define OVERSPILL_NO_SIGNAL 0
#endif

// The connection that this thread is making, until it has answered. A server that works for another process accepts one
// and leaves it unanswered.
struct overspill_new_connection {
    int fd = -1;
    std::chrono::steady_clock::time_point give_up_at{};
};
static thread_local overspill_new_connection overspill_unanswered;

// A server waits for its clients as long as they like.
static std::atomic<bool> overspill_is_client{false};

static bool overspill_goes_on(int fd) {
    if (!overspill_is_client.load(std::memory_order_relaxed)) {
        return true;
    }
    const bool too_late =
        fd == overspill_unanswered.fd && std::chrono::steady_clock::now() > overspill_unanswered.give_up_at;
    if (!too_late && !overspill_lost_threads().take() && !overspill_told_to_stop()) {
        return true;
    }
    shutdown(fd, SHUT_RDWR);
    errno = ETIMEDOUT;
    return false;
}

// Upstream forgets a connection that could not be made.
static void overspill_close_unanswered() {
    close(overspill_unanswered.fd);
    overspill_unanswered.fd = -1;
}

// Upstream sets TCP_NODELAY on every connection: before connecting on a client, afterwards on a server.
static int overspill_setsockopt(int fd, int level, int name, const void * value, socklen_t size) {
    if (level == IPPROTO_TCP && name == TCP_NODELAY) {
        const auto set = [fd](int of_level, int option, int to) { setsockopt(fd, of_level, option, &to, sizeof(to)); };
        set(SOL_SOCKET, SO_KEEPALIVE, 1);
        // Seconds; all three: lost after half a minute. macOS has another name for the first.
#if defined(TCP_KEEPIDLE)
        set(IPPROTO_TCP, TCP_KEEPIDLE, 10);
#elif defined(TCP_KEEPALIVE)
        set(IPPROTO_TCP, TCP_KEEPALIVE, 10);
#endif
#if defined(TCP_KEEPINTVL) && defined(TCP_KEEPCNT)
        set(IPPROTO_TCP, TCP_KEEPINTVL, 5);
        set(IPPROTO_TCP, TCP_KEEPCNT, 4);
#endif
#ifdef SO_NOSIGPIPE
        set(SOL_SOCKET, SO_NOSIGPIPE, 1);
#endif
        sockaddr_storage peer;
        socklen_t peer_size = sizeof(peer);
        if (getpeername(fd, reinterpret_cast<sockaddr *>(&peer), &peer_size) != 0) {
            overspill_is_client.store(true);
            const timeval interval{0, 1000 * overspill_asking_interval_ms};
            setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &interval, sizeof(interval));
            setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &interval, sizeof(interval));
            overspill_unanswered = {fd, std::chrono::steady_clock::now() + std::chrono::seconds(10)};
        }
    }
    return setsockopt(fd, level, name, value, size);
}

static hostent * overspill_gethostbyname(const char * host) {
    hostent * found = gethostbyname(host);
    if (found == nullptr) {
        overspill_close_unanswered();
    }
    return found;
}

// Without blocking, since only Linux has connect() heed SO_SNDTIMEO.
static int overspill_connect(int fd, const sockaddr * address, socklen_t size) {
    const int flags = fcntl(fd, F_GETFL);
    fcntl(fd, F_SETFL, flags | O_NONBLOCK);
    int status = connect(fd, address, size);
    int error = status == 0 ? 0 : errno;
    while ((error == EINTR || error == EINPROGRESS) && overspill_goes_on(fd)) {
        pollfd made{fd, POLLOUT, 0};
        if (poll(&made, 1, overspill_asking_interval_ms) > 0) {
            socklen_t error_size = sizeof(error);
            getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &error_size);
            status = error == 0 ? 0 : -1;
        }
    }
    fcntl(fd, F_SETFL, flags);
    if (status != 0) {
        overspill_close_unanswered();
    }
    return status;
}

static bool overspill_should_repeat(ssize_t n, int fd) {
    return n < 0 && (errno == EINTR || errno == EAGAIN || errno == EWOULDBLOCK) && overspill_goes_on(fd);
}

static ssize_t overspill_recv(int fd, void * data, size_t size, int flags) {
    ssize_t n;
    do {
        n = recv(fd, data, size, flags);
    } while (overspill_should_repeat(n, fd));
    if (n > 0 && fd == overspill_unanswered.fd) {
        overspill_unanswered.fd = -1;  // from now on it may take its time, as for a long prompt
    }
    return n;
}

static ssize_t overspill_send(int fd, const void * data, size_t size, int flags) {
    ssize_t n;
    do {
        n = send(fd, data, size, flags | OVERSPILL_NO_SIGNAL);
    } while (overspill_should_repeat(n, fd));
    return n;
}

// With their arguments, so that members of these names are left alone where they take others.
#define setsockopt(fd, level, name, value, size) overspill_setsockopt(fd, level, name, value, size)
#define gethostbyname(host) overspill_gethostbyname(host)
#define recv(fd, data, size, flags) overspill_recv(fd, data, size, flags)
#define send(fd, data, size, flags) overspill_send(fd, data, size, flags)
// Upstream's own connect() takes two arguments.
#define OVERSPILL_FOURTH(first, second, third, fourth, ...) fourth
#define connect(...) OVERSPILL_FOURTH(__VA_ARGS__, overspill_connect, connect, )(__VA_ARGS__)

#endif
