//! `workload=serve`: the network stack and the loop that drives it.

use crate::console::Console;
use crate::ram::Free;
use crate::services::{self, Connections};
use crate::virtio::net::Net;
use crate::virtio::rng::Rng;
use crate::{cpu, println, serial, timer};
use bare::counter::Counter;
use bare::options::{Address, Options};
use smoltcp::iface::{Config, Interface, SocketSet, SocketStorage};
use smoltcp::time::Instant;
use smoltcp::wire::{EthernetAddress, IpCidr};

/// Serves for ever, asleep while there is nothing to do.
pub fn run(options: &Options, mut free: Free) -> ! {
    let mut counter = Counter::new();
    let mut console = Console::new();
    let random = Rng::find(&options.devices, &mut free).map_or(0, |mut rng| rng.word());
    let network = Net::find(&options.devices, &mut free).zip(options.address);
    let Some((mut device, address)) = network else {
        println!("no virtio-net device or no ip= on the command line: only the console is served");
        loop {
            console.on_interrupt(cpu::wait(serial::IRQ), &mut counter);
        }
    };
    let mut interface = interface(&mut device, address, options.seed ^ random);
    let mut storage = [const { SocketStorage::EMPTY }; services::CONNECTIONS];
    let mut sockets = SocketSet::new(&mut storage[..]);
    let mut connections = Connections::new(&mut sockets, &mut free);
    println!("READY");
    loop {
        loop {
            interface.poll(now(), &mut device, &mut sockets);
            let served = connections.serve(&mut sockets, &mut counter);
            if !served && !device.flush() {
                break;
            }
        }
        let deadline = interface.poll_at(now(), &sockets);
        loop {
            let taken = cpu::wait(cpu::TIMER | serial::IRQ | device.irq());
            console.on_interrupt(taken, &mut counter);
            if taken & device.irq() != 0 {
                device.acknowledge();
                break;
            }
            if deadline.is_some_and(|deadline| deadline <= now()) {
                break;
            }
        }
    }
}

fn interface(device: &mut Net, address: Address, seed: u64) -> Interface {
    let mut config = Config::new(EthernetAddress(device.mac).into());
    config.random_seed = seed;
    let mut interface = Interface::new(config, device, now());
    interface.update_ip_addrs(|addresses| {
        let own = IpCidr::new(address.own.into(), address.prefix_len);
        addresses.push(own).expect("smoltcp has room for an address");
    });
    if let Some(gateway) = address.gateway {
        interface.routes_mut().add_default_ipv4_route(gateway).expect("smoltcp has room for a route");
    }
    interface
}

fn now() -> Instant {
    Instant::from_millis(timer::ms() as i64)
}
