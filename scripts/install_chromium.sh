# Sourced by test.sh: the tests of the browser app drive a Chromium; installs Debian's where there is none.
if ! command -v chromium chromium-browser google-chrome >/dev/null; then
  sudo=$([ "$(id -u)" = 0 ] || echo sudo)
  echo "installing chromium …" >&2
  { $sudo apt-get -qq update && $sudo apt-get -qq install --yes --no-install-recommends chromium; } >/dev/null || {
    echo "tests/catalogs/test_browse.py needs Chromium or Chrome on the PATH, and it could not be installed: install either" >&2
    exit 1
  }
fi
