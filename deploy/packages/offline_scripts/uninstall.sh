#!/bin/sh
# Removes what install.sh of the same bundle made.
#
#   ./uninstall.sh [--prefix /opt/farpoint] [--purge] [PROGRAM…]        all programs if none is named
#
# Settings, state, keys and the services' users stay; --purge removes them too. A store is never touched.
set -eu

prefix=/opt/farpoint
purge=no
programs=
while [ $# -gt 0 ]; do
  case "$1" in
  --prefix)
    prefix=${2:?--prefix needs a directory}
    shift
    ;;
  --purge) purge=yes ;;
  mobility-agent | process-server | config-server | recovery) programs="$programs $1" ;;
  *)
    sed -n '2,6s/^# \{0,1\}//p' "$0" >&2
    exit 2
    ;;
  esac
  shift
done
[ "$(id -u)" = 0 ] || {
  echo "uninstall.sh: must be root" >&2
  exit 1
}

remove_program() {
  program=$1
  command=$program
  [ "$program" = recovery ] && command=farpoint
  unit=farpoint-$program.service
  if [ -e "/etc/systemd/system/$unit" ]; then
    owner=$(sed -n 's/^User=//p' "/etc/systemd/system/$unit")
    [ ! -d /run/systemd/system ] || systemctl stop "$unit"
    for each in "/etc/systemd/system/farpoint-$program"*.service; do
      ! command -v systemctl >/dev/null || systemctl --quiet disable "${each##*/}"
      rm -f "$each"
    done
    [ ! -d /run/systemd/system ] || systemctl daemon-reload
  else
    owner=farpoint-$program
  fi
  case "$(readlink "/usr/local/bin/$command" 2>/dev/null || true)" in
  "$prefix/"*) rm -f "/usr/local/bin/$command" ;;
  esac
  rm -rf "$prefix/$program"-*
  # Tracing programs and maps that outlive the agent.
  [ "$program" != mobility-agent ] || rm -rf /sys/fs/bpf/farpoint
  if [ "$purge" = yes ]; then
    rm -rf "/var/lib/farpoint/$program" "/etc/farpoint/$command.toml"
    if [ "$owner" != root ] && getent passwd "$owner" >/dev/null; then
      userdel "$owner"
    fi
  fi
  echo "removed $program"
}

for program in ${programs:-mobility-agent process-server config-server recovery}; do
  remove_program "$program"
done
for program in mobility-agent process-server config-server recovery; do
  for left in "$prefix/$program"-*; do
    [ ! -e "$left" ] || exit 0
  done
done
rm -f "$prefix/uninstall.sh"
for folder in "$prefix" /etc/farpoint /var/lib/farpoint; do
  [ ! -d "$folder" ] || rmdir --ignore-fail-on-non-empty "$folder"
done
