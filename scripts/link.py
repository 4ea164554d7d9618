"""Programs that scripts/bench runs at the two ends of a pair's link, to measure what the link costs without vmft.

    link.py echo | ask   round trips of a byte by TCP, with a pause between them; ask prints the median in us
    link.py sink KEYS | carry KEYS TAP   carry sends to sink, by TLS, as many bytes as the host sends into TAP
"""
import os
import socket
import ssl
import statistics
import sys
import time

ADDRESS = ("10.78.0.2", 7499)
# The size of a full block of vmft's log in bytes, and the pause before more is sent.
BLOCK, WAIT_S = 63 << 10, 0.002


def listen():
    listener = socket.create_server(ADDRESS)
    print("ready", flush=True)
    return no_delay(listener.accept()[0])


def no_delay(connection):
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def echo():
    connection = listen()
    while byte := connection.recv(1):
        connection.send(byte)


def ask():
    connection = no_delay(socket.create_connection(ADDRESS))
    times = []
    for _ in range(2000):
        time.sleep(0.0002)
        begin = time.perf_counter()
        connection.send(b"x")
        connection.recv(1)
        times.append(time.perf_counter() - begin)
    print(statistics.median(times) * 1e6)


def tls(side, keys):
    context = ssl.SSLContext(side)
    context.minimum_version, context.check_hostname, context.verify_mode = ssl.TLSVersion.TLSv1_3, False, ssl.CERT_NONE
    if side == ssl.PROTOCOL_TLS_SERVER:
        context.load_cert_chain(f"{keys}/own.crt", f"{keys}/own.key")
    return context


def sink(keys):
    connection = tls(ssl.PROTOCOL_TLS_SERVER, keys).wrap_socket(listen(), server_side=True)
    buffer = bytearray(2 * BLOCK)
    while connection.recv_into(buffer):
        pass


def carry(keys, tap):
    connection = tls(ssl.PROTOCOL_TLS_CLIENT, keys).wrap_socket(no_delay(socket.create_connection(ADDRESS)))
    counter = os.open(f"/sys/class/net/{tap}/statistics/tx_bytes", os.O_RDONLY)
    block, carried = os.urandom(BLOCK), None
    print("ready", flush=True)
    while True:
        taken = int(os.pread(counter, 32, 0))
        carried = taken if carried is None else carried
        while carried < taken:
            carried += connection.send(memoryview(block)[:taken - carried])
        time.sleep(WAIT_S)


if __name__ == "__main__":
    {"echo": echo, "ask": ask, "sink": sink, "carry": carry}[sys.argv[1]](*sys.argv[2:])
