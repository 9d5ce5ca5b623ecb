// Included by force before transport.cpp of llama.cpp, whose connections wait for ever for a machine that has
// vanished, take any signal for the end of the connection, and die of SIGPIPE when the other side has gone.
#pragma once

#ifndef _WIN32

#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <sys/time.h>

#include <cerrno>

#ifdef MSG_NOSIGNAL
#define OVERSPILL_NO_SIGNAL MSG_NOSIGNAL
#else
#define OVERSPILL_NO_SIGNAL 0
#endif

// The connection that this thread has made and that has not answered yet. A server that works for another process
// accepts one and leaves it unanswered.
static thread_local int overspill_unanswered = -1;

static void overspill_limit_waiting(int fd, int seconds) {
    const timeval limit{seconds, 0};
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof(limit));
    setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof(limit));  // on Linux, connecting as well
}

// Upstream sets TCP_NODELAY on every connection: before connecting on a client, afterwards on a server.
static int overspill_setsockopt(int fd, int level, int name, const void * value, socklen_t size) {
    if (level == IPPROTO_TCP && name == TCP_NODELAY) {
        const auto set = [fd](int of_level, int option, int to) { setsockopt(fd, of_level, option, &to, sizeof(to)); };
        set(SOL_SOCKET, SO_KEEPALIVE, 1);
#if defined(TCP_KEEPIDLE) && defined(TCP_KEEPINTVL) && defined(TCP_KEEPCNT)
        set(IPPROTO_TCP, TCP_KEEPIDLE, 10);  // seconds; with the next two: lost after half a minute
        set(IPPROTO_TCP, TCP_KEEPINTVL, 5);
        set(IPPROTO_TCP, TCP_KEEPCNT, 4);
#endif
#ifdef SO_NOSIGPIPE
        set(SOL_SOCKET, SO_NOSIGPIPE, 1);
#endif
        sockaddr_storage peer;
        socklen_t peer_size = sizeof(peer);
        if (getpeername(fd, reinterpret_cast<sockaddr *>(&peer), &peer_size) != 0) {
            overspill_limit_waiting(fd, 10);
            overspill_unanswered = fd;
        }
    }
    return setsockopt(fd, level, name, value, size);
}

static ssize_t overspill_recv(int fd, void * data, size_t size, int flags) {
    ssize_t n;
    do {
        n = recv(fd, data, size, flags);
    } while (n < 0 && errno == EINTR);
    if (n > 0 && fd == overspill_unanswered) {
        overspill_limit_waiting(fd, 0);  // a long prompt takes its time
        overspill_unanswered = -1;
    }
    return n;
}

static ssize_t overspill_send(int fd, const void * data, size_t size, int flags) {
    ssize_t n;
    do {
        n = send(fd, data, size, flags | OVERSPILL_NO_SIGNAL);
    } while (n < 0 && errno == EINTR);
    return n;
}

// With their arguments, so that members of these names are left alone where they take others.
#define setsockopt(fd, level, name, value, size) overspill_setsockopt(fd, level, name, value, size)
#define recv(fd, data, size, flags) overspill_recv(fd, data, size, flags)
#define send(fd, data, size, flags) overspill_send(fd, data, size, flags)

#endif
