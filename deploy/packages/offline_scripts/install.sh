#!/bin/sh
# Installs Farpoint's programs from this folder, without any network. An upgrade is the same command from a newer bundle.
#
#   ./install.sh [--prefix /opt/farpoint] PROGRAM…        PROGRAM: mobility-agent process-server config-server recovery
#
# It makes PREFIX/PROGRAM-VERSION (a virtual environment), /usr/local/bin/COMMAND, /etc/farpoint/COMMAND.toml unless there is
# one, and for a service its user, /var/lib/farpoint/PROGRAM (0700) and /etc/systemd/system/farpoint-PROGRAM*.service, enabled
# but not started: it has to be enrolled first. PYTHON=… names another interpreter of the same version.
set -eu
umask 022
cd "$(dirname "$0")"

fail() {
  echo "install.sh: $*" >&2
  exit 1
}

prefix=/opt/farpoint
programs=
while [ $# -gt 0 ]; do
  case "$1" in
  --prefix)
    [ $# -ge 2 ] || fail "--prefix needs a directory"
    prefix=$2
    shift
    ;;
  mobility-agent | process-server | config-server | recovery) programs="$programs $1" ;;
  *)
    sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
    exit 2
    ;;
  esac
  shift
done
[ -n "$programs" ] || fail "say which programs: mobility-agent process-server config-server recovery"
case "$prefix" in
/*[!A-Za-z0-9/._-]* | [!/]*) fail "--prefix must be an absolute path of letters, digits and . _ -" ;;
esac
[ "$(id -u)" = 0 ] || fail "must be root"

sha256sum --check --strict --quiet SHA256SUMS || fail "this bundle is damaged"
target() {
  sed -n "s/^$1=//p" target
}
version=$(target version)
python=${PYTHON:-$(command -v "$(target python)" || true)}
[ -n "$python" ] || fail "this bundle is for $(target python), which is not installed here"
"$python" -I - "$(target python)" "$(target machine)" "$(target c_library)" <<'CHECK' || exit 1
import platform, sys

python, machine, c_library = sys.argv[1:]
found = f"python{sys.version_info.major}.{sys.version_info.minor}"
if found != python or platform.machine() != machine:
    sys.exit(f"install.sh: this bundle is for {python} on {machine}; this is {found} on {platform.machine()}")
name, version = platform.libc_ver()
if name != "glibc" or tuple(map(int, version.split("."))) < tuple(map(int, c_library.split("."))):
    sys.exit(f"install.sh: this bundle needs glibc {c_library} or newer; this is {name or 'another C library'} {version}")
CHECK

install_program() {
  program=$1
  command=$program
  [ "$program" = recovery ] && command=farpoint
  home=$prefix/$program-$version
  if [ ! -e "$home/.complete" ]; then
    rm -rf "$home"
    mkdir -p "$prefix"
    "$python" -I -m venv --without-pip "$home"
    # A wheel is a folder to Python: pip runs from its own.
    PYTHONPATH='' "$python" "$(echo wheels/pip-*.whl)/pip" --disable-pip-version-check --python "$home/bin/python" install --quiet \
      --no-index --find-links wheels --no-deps --require-hashes --requirement "requirements/$program.txt"
    touch "$home/.complete"
  fi
  mkdir -p /usr/local/bin /etc/farpoint
  ln -sfn "$home/bin/$command" "/usr/local/bin/$command"
  [ -e "/etc/farpoint/$command.toml" ] || install -m 0644 "settings/$command.toml" "/etc/farpoint/$command.toml"
  [ "$program" = recovery ] || install_service "$program"
  for other in "$prefix/$program"-*; do
    [ "$other" = "$home" ] || rm -rf "$other"
  done
  install -m 0755 uninstall.sh "$prefix/uninstall.sh"
  echo "installed $program $version: /usr/local/bin/$command"
}

install_service() {
  unit=farpoint-$1.service
  owner=$(sed -n 's/^User=//p' "systemd/$unit")
  if ! getent passwd "$owner" >/dev/null; then
    useradd --system --user-group --no-create-home --home-dir "/var/lib/farpoint/$1" --shell /usr/sbin/nologin "$owner"
  fi
  [ -d /var/lib/farpoint ] || install -d -m 0755 /var/lib/farpoint
  [ -d "/var/lib/farpoint/$1" ] || install -d -m 0700 -o "$owner" -g "$owner" "/var/lib/farpoint/$1"
  mkdir -p /etc/systemd/system
  for each in "systemd/farpoint-$1"*.service; do
    sed "s|^\(Exec[A-Za-z]*\)=/usr/bin/|\1=/usr/local/bin/|" "$each" >"/etc/systemd/system/${each#systemd/}"
    ! command -v systemctl >/dev/null || systemctl --quiet enable "${each#systemd/}"
  done
  if [ -d /run/systemd/system ]; then
    systemctl daemon-reload
    systemctl try-restart "$unit"
  fi
}

for program in $programs; do
  install_program "$program"
done
